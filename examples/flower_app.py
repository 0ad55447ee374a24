"""IOP-FL between institutions by Flower: each hospital trains on its own machine.

    pip install 'flwr[simulation]'
    python -m examples.flower_app --out DIR       three simulated hospitals on this machine

Images and personalised models stay at their hospital; what leaves it are local models. DIR gets
global.pt and for each hospital personal-<hospital>.pt. With as many threads these are the models of
`iopfl.federate` and `iopfl.update_personal`.

Across machines the same app runs on Flower's own server (SuperLink) and one process at each
hospital (SuperNode). All need torch, this project's requirements and flwr; the project's files come
over the network. This was tried with flwr 1.42 and is not encrypted, so it is for a first trial:

    flower-superlink --insecure --host 0.0.0.0 --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink SERVER:8000 --node-config 'partition-id=0'
    flwr run . hospitals --stream

The first command starts the server; --host lets other machines reach it. The second starts at each
hospital with a partition-id of its own, 0, 1 and 2 here; several on one machine need a --port each.
The third sends the app to the server, from a folder with this project and a pyproject.toml:

    [project]
    name = "iopfl"
    version = "1.0"
    [tool.flwr.app]
    publisher = "hospitals"
    [tool.flwr.app.components]
    serverapp = "examples.flower_app:server"
    clientapp = "examples.flower_app:client"

It finds the server by ~/.flwr/config.toml:

    [superlink.hospitals]
    address = "SERVER:8000"
    insecure = true

global.pt then lies in runs/flower below the folder in which the SuperLink was started, and each
personalised model below its SuperNode's. FLWR_TELEMETRY_ENABLED=0 in the environment of all of them
keeps Flower from reporting to its makers that it is used.
"""

from pathlib import Path

import torch

import data
import iopfl
import train
from models import UNet

try:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
except ImportError:
    train.stop("Flower is missing or too old; pip install -U 'flwr[simulation]'", 1)

TASK, SIZE, IMAGES_PER_SITE = "prostate", 32, 12
HOSPITALS = 3
ROUNDS = 2
ALPHA = 0.7
SEED = 0


def new_model() -> UNet:
    generator = torch.Generator().manual_seed(SEED)  # of the initial weights
    return UNet(1, 2, width=8, depth=2, generator=generator)


def hospital(number: int) -> data.Site:
    """The images of a hospital. Replace this by `folders.load_folder` for real ones, and in
    `new_model` the channels and classes."""
    dataset = data.simulate_sites(TASK, SEED, SIZE, IMAGES_PER_SITE, HOSPITALS)
    return dataset.sites[number]


# ---------------------------------------------------------------- at a hospital
def client_app(out: Path) -> ClientApp:
    """What runs at a hospital; its personalised model is written into the folder `out`."""
    app = ClientApp()

    @app.train()
    def train_one_round(message: Message, context: Context) -> Message:
        """Train the global model, update the personalised one, and send the local one back.

        context.state: what the hospital keeps from round to round, the personalised model alone.
        """
        number = context.node_config["partition-id"]
        this_round = message.content["config"]["server-round"]  # from 1
        site = hospital(number)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        split = site.train.to(device)
        model = new_model().to(device)
        global_state = message.content["arrays"].to_torch_state_dict()  # g^{t-1}
        model.load_state_dict(global_state)
        generator = iopfl.seeded(SEED, this_round, site.name)
        loss = iopfl.train_local(model, split.images, split.masks, generator=generator)
        local = iopfl.snapshot(model)  # w_k^t

        kept = context.state
        personal = None
        if "personal" in kept:
            personal = kept["personal"].to_torch_state_dict()
        personal = iopfl.update_personal(personal, local, ALPHA)  # p_k^t (M2)
        kept["personal"] = ArrayRecord(personal)
        train.save(out / f"personal-{site.name}.pt", personal)

        metrics = {"number": number, "images": len(split.images), "loss": loss}
        answer = {"arrays": ArrayRecord(local), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(answer), reply_to=message)

    return app


# ---------------------------------------------------------------- at the server
class Average(FedAvg):
    """Flower chooses the hospitals and waits for them; the mean is that of `iopfl.aggregate`.

    It takes BatchNorm's counter as a whole number and refuses a state that is not finite. A
    hospital that answers with an error is left out of the round.
    """

    def aggregate_train(self, server_round: int, replies) -> tuple:
        answers = []
        for reply in replies:
            if reply.has_error():
                print(f"node {reply.metadata.src_node_id} is left out: {reply.error.reason}")
            else:
                answers.append(reply.content)
        answers.sort(key=lambda answer: answer["metrics"]["number"])  # the order of a sum matters
        states, sizes, losses = [], [], []
        for answer in answers:
            states.append(answer["arrays"].to_torch_state_dict())
            sizes.append(answer["metrics"]["images"])
            losses.append(f"{answer['metrics']['loss']:.3f}")
        print(f"round {server_round:3}/{ROUNDS}  Dice loss  {'  '.join(losses)}")
        global_state = iopfl.aggregate(states, sizes)  # g^t (M1)
        return ArrayRecord(global_state), None


def server_app(out: Path) -> ServerApp:
    """What runs at the server; the last global model is written into the folder `out`."""
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = Average(
            fraction_evaluate=0.0, min_train_nodes=HOSPITALS, min_available_nodes=HOSPITALS)
        start = ArrayRecord(iopfl.snapshot(new_model()))  # g^0
        result = strategy.start(grid, start, num_rounds=ROUNDS)
        train.save(out / "global.pt", result.arrays.to_torch_state_dict())

    return app


# `flwr run` takes these two.
client = client_app(Path("runs/flower").absolute())
server = server_app(Path("runs/flower").absolute())


# ---------------------------------------------------------------- all on this machine
def main(argv: list[str] | None = None) -> None:
    parser = train.Parser(__doc__)
    parser.add_argument("--out", default="runs/flower", help="a new or empty folder")
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser().resolve()
    train.check_out(out, None, parser)
    run_simulation(server_app(out), client_app(out), num_supernodes=HOSPITALS)
    if not (out / "global.pt").exists():
        train.stop("the federation has not come to its end; Flower's messages say why", 1)
    personal = list(out.glob("personal-*.pt"))
    print(f"The global model and {len(personal)} personalised ones: {out}")


if __name__ == "__main__":
    main()
