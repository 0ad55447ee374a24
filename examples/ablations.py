"""What the parts of the method are worth: variants of them on the models of finished runs.

    python train.py --hold-out all --seeds 0 1 2 --out runs/outside
    python -m examples.ablations runs/outside      routing, on the saved models
    python train.py --hold-out none --seeds 0 1 2 --out runs/inside
    python -m examples.ablations runs/inside       α inside: one federation a seed is trained again

    python -m examples.ablations runs/outside --images 1 --variants "no steps" "no factor, no steps"

Prints for each variant its mean Dice and its difference to our method, or to the first that was
named, in points: mean, least and most over all hospitals and seeds; wins, ties (below 0.1 points)
and losses; p of the sign test.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import iopfl
import router
import train
from examples.adapt_folder import finished_federations, load_models
from examples.own_images import images_of_run

LABELS = "routers on labels"
# Changes of the settings, of where routing starts (`fit`, `by`), of what is routed.
ROUTING = {
    "routing-ours": {},
    "no steps": {"settings": {"passes": 0}},
    "the start alone": {"settings": {"passes": 0}, "fit": {"share": 0.0}},
    "by image": {"settings": {"passes": 0}, "by": "image"},
    "by layer": {"settings": {"passes": 0}, "by": "layer"},
    "by both": {"settings": {"passes": 0}, "by": "both"},
    LABELS: {"on_labels": True},  # a ceiling of what routing can choose
    "no shape": {"settings": {"shape": 0.0}},  # consistency alone, since entropy is off
    "no consistency": {"settings": {"consistency": 0.0}},  # shape alone
    "with entropy": {"settings": {"entropy": 0.1}},
    "sigmoid": {"settings": {"softmax": False}},
    "no factor, no steps": {"settings": {"passes": 0}, "factor": False},  # n / (n + 16)
    "batch statistics": {"settings": {"batch_statistics": True}},
    "share 0": {"fit": {"share": 0.0}},
    "share 1/4": {"fit": {"inside": None}},
    "share 1": {"fit": {"share": 1.0}},
    "random start": {"fit": {"start": "random"}},
    "uniform start": {"fit": {"start": "uniform"}},
    "global only": {"experts": "global"},
    "personal only": {"experts": "personal", "fit": {"global_prior": None}},
    "10 passes, no leash": {"settings": {"passes": 10, "leash": None}},
}
GLOBAL = "global model"
ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
GLOBAL_CONTROL = "the global model, α 0.7"  # accumulated like a personalised one
OWN_STATISTICS = "own statistics, "  # of BatchNorm, counted anew on the hospital's training images


def main(argv: list[str] | None = None) -> None:
    with train.errors_in_one_line():
        parser = train.Parser(__doc__)
        add = parser.add_argument
        add("runs", nargs="+", metavar="RUN", help="a finished run of train.py")
        add("--variants", nargs="+", metavar="NAME", help="of routing (all)")
        add("--images", type=int, help="adapt to so many at a time (to all at once)")
        args = parser.parse_args(argv)
        for name in args.variants or []:
            if name not in ROUTING:
                parser.error(f"--variants: {name} is unknown; known are {', '.join(ROUTING)}")
        if args.images is not None and args.images < 1:
            parser.error("--images must be at least 1")
        if args.images and LABELS in (args.variants or []):
            parser.error(f"--images: not with '{LABELS}', which need cases to learn from")
        run(args, parser)


def run(args: argparse.Namespace, parser: train.Parser) -> None:
    """Compute all variants on each federation of the runs, and print the table."""
    names = args.variants or [name for name in ROUTING if not (args.images and name == LABELS)]
    finished = []
    for folder in dict.fromkeys(Path(run).resolve() for run in args.runs):
        finished += open_federations(folder)
    if not finished:
        train.stop("no finished federation seed…-plain in these runs", 2)
    reference = common_reference(finished, names, parser)
    if reference not in names and (args.variants or args.images):
        parser.error("--variants and --images are for runs with a hospital outside")

    scores = {}  # by variant: the mean Dice of each hospital and seed
    for federation in finished:
        print(federation.folder)
        train.prepare_torch(federation.args)
        if federation.hold_out is None:
            variants = vary_alpha(federation)
        else:
            variants = vary_routing(federation, names, args.images)
        for name, values in variants.items():
            scores.setdefault(name, []).extend(values)
    print_table(scores, reference)


def common_reference(finished: list[train.Federation], names: list[str], parser) -> str:
    """The variant that the others are compared with; refuses runs that have not the same."""
    references = set()
    for federation in finished:
        inside = federation.hold_out is None
        references.add(f"α {federation.args.alpha}" if inside else names[0])
    if len(references) > 1:
        parser.error("these runs are of different kinds; name them one at a time")
    return references.pop()


def open_federations(run: Path) -> list[train.Federation]:
    """All finished federations of a run whose models can be routed, with their images; those of the
    run's first seed must be what they were."""
    settings = argparse.Namespace(**train.load_config(run)["settings"])
    settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.methods = ["iopfl"]  # Ditto's models need not be trained
    found = []
    datasets = {}  # by seed
    for folder in finished_federations(run):
        result = train.load(folder / "rows.json", "seed", "hold_out")
        seed, hold_out = result["seed"], result["hold_out"]
        if seed not in datasets:
            datasets[seed] = images_of_run(settings, seed)
            if seed == settings.seeds[0]:
                train.check_images(run, datasets[seed].fingerprint())
        dataset = datasets[seed]
        found.append(train.Federation(settings, dataset, seed, hold_out, "plain", folder))
    return found


# ---------------------------------------------------------------- outside
def vary_routing(federation: train.Federation, names: list[str],
                 images_at_a_time: int | None) -> dict[str, list[float]]:
    """By variant of routing, and for the global model, the mean Dice on the hospital held out."""
    settings, dataset = federation.args, federation.dataset
    config = train.load_config(federation.folder.parent)
    models = list(load_models(federation.folder, config, settings.device).values())
    result = train.load(federation.folder / "rows.json", "distances_inside")
    inside = list(result["distances_inside"].values())
    site = next(site for site in dataset.sites if site.name == federation.hold_out)
    split = site.everything.to(settings.device)
    numbers = torch.arange(len(split.images)).split(images_at_a_time or len(split.images))
    scores = {}
    for name in [*names, GLOBAL]:
        with train.autocast(settings.device, settings.precision):
            if name == GLOBAL:
                predicted = [train.probabilities_of(models[-1], split.images)]
            else:
                variant = ROUTING[name]
                predicted = []
                for part in numbers:
                    cases = [split.cases[number] for number in part]
                    of_part = data.Split(split.images[part].float(), split.masks[part], cases)
                    predicted.append(route(models, of_part, federation.seed, inside, **variant))
        prediction = torch.cat(predicted).argmax(dim=1)
        rows = iopfl.evaluate(
            prediction, split.masks, split.cases, dataset.structures, site.spacing,
            distances=False)
        scores[name] = [mean_dice(rows)]
    return scores


def route(
    models: list,
    split: data.Split,
    seed: int,
    inside: list[float],
    *,
    settings: dict = {},
    fit: dict = {},
    experts: str = "all",
    factor: bool = True,
    by: str | None = None,
    on_labels: bool = False,
) -> Tensor:
    """Probabilities (N, C, H, W) by a variant of `train.routing_ours`."""
    routing_settings = router.RoutingSettings(**settings)
    images = split.images
    options = {"inside": inside}
    if not factor or experts == "personal":  # the share that all models give, before the factor
        D = router.divergence(models[-1], images).item()
        options["share"] = router.site_share(D, torch.tensor(inside))
    if experts == "global":
        models = models[-1:]
    if experts == "personal":
        n = len(router.some_of_all(images))
        options["share"] *= n / (n + router.PRIOR_IMAGES)
        models = models[:-1]
    routed = router.build_routed(models, routing_settings, train.new_generator(seed))
    options.update(fit)
    router.fit_to_site(routed, models, images, **options)
    if by:
        return routed_by(routed, models, images, by)
    if on_labels:
        return routers_on_labels(routed, split, seed)
    return train.adapted(routed, images, seed).probabilities


@torch.no_grad()
def routed_by(routed: router.RoutedNetwork, models: list, images: Tensor, by: str) -> Tensor:
    """Probabilities, without steps, if routing starts in each image, layer or both by itself."""
    distances = [divergence_of_each(model, images, pooled=by == "layer") for model in models]
    routers = {}
    for name, module in routed.named_modules():
        if isinstance(module, router.Router):
            routers[name.removeprefix("network.").removesuffix(".router")] = module
    predicted = []
    for number, image in enumerate(images.split(1)):
        place = 0 if by == "layer" else number
        for name, module in routers.items():
            layer = name if by != "image" and name in distances[0] else MEAN
            D = torch.stack([of_model[layer][place] for of_model in distances])  # (M,)
            weights = router.start_weights(D.float()).clamp(1e-6, 1 - 1e-6)
            module.fc2.bias.copy_(weights.log())
        predicted.append(router.predict(routed, image))
    return torch.cat(predicted)


MEAN = "mean over norms"  # for layers that no norm follows


@torch.no_grad()
def divergence_of_each(model, images: Tensor, pooled: bool) -> dict[str, Tensor]:
    """By layer that a norm follows, and as MEAN, the divergence of the norm's inputs, (N,).

    pooled: of all images together, (1,), instead of each image.
    """
    model = router.evaluation_copy(model)
    last = [None]  # the name of the layer that ran last
    norms, moments = {}, {}

    def remember(name: str):
        def hook(module, inputs, output):
            last[0] = name
        return hook

    def count(norm, inputs):
        mean, square = inputs[0].double().mean(dim=(2, 3)), inputs[0].double().square()
        norms[last[0]] = norm
        moments.setdefault(last[0], []).append(torch.stack([mean, square.mean(dim=(2, 3))]))

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            module.register_forward_hook(remember(name))
    for norm in router.running_norms(model):
        norm.register_forward_pre_hook(count)
    for batch in images.split(8):
        model(batch)
    distances = {}
    for name, parts in moments.items():
        of_images = torch.cat(parts, dim=1)  # (2, N, C)
        if pooled:
            of_images = of_images.mean(dim=1, keepdim=True)
        values = [router.gaussian_divergence(mean, square - mean.square(), norms[name])
                  for mean, square in of_images.unbind(dim=1)]
        distances[name] = torch.stack(values)
    distances[MEAN] = torch.stack(list(distances.values())).mean(dim=0)
    return distances


def routers_on_labels(routed: router.RoutedNetwork, split: data.Split, seed: int) -> Tensor:
    """Probabilities of each half of the cases, the routers tuned on the labels of the other half:
    ten epochs, as for the oracle."""
    generator = train.new_generator(seed)
    routed.requires_grad_(False)
    for module in routed.parts(router.Router):
        module.requires_grad_(True)
    probabilities = router.predict(routed, split.images)
    half = train.half_of_cases(split, generator)
    for tested in (half, ~half):
        routed.reset()
        images, masks = split.images[~tested], split.masks[~tested]
        iopfl.train_local(routed, images, masks, epochs=10, generator=generator)
        probabilities[tested] = router.predict(routed, split.images[tested])
    return probabilities


# ---------------------------------------------------------------- inside
def vary_alpha(federation: train.Federation) -> dict[str, list[float]]:
    """By α the Dice of each hospital's personalised model, read off one federation (M2).
    The default's and the global model are scored with statistics of the hospital's own too."""
    args = federation.args
    model = train.new_model(args, federation.dataset, federation.seed)
    personal = {alpha: {} for alpha in {*ALPHAS, args.alpha}}  # by α, then by hospital
    accumulated = None
    with train.autocast(args.device, args.precision):
        for last in train.rounds_of(federation, model):
            accumulated = iopfl.update_personal(accumulated, last.global_state, 0.7)
            for alpha, states in personal.items():
                for name, local in last.local.items():
                    states[name] = iopfl.update_personal(states.get(name), local, alpha)
        scores = {}
        for alpha in sorted(personal):
            progress = train.Progress(last, personal[alpha])
            scores[f"α {alpha}"] = dice_by_hospital(federation, model, progress)
        names = [site.name for site in federation.inside]
        shared = dict.fromkeys(names, last.global_state)
        control = dict.fromkeys(names, accumulated)
        for variant, states in ((GLOBAL, shared), (GLOBAL_CONTROL, control)):
            progress = train.Progress(last, states)
            scores[variant] = dice_by_hospital(federation, model, progress)
        for variant, states in (("global", shared), (f"α {args.alpha}", personal[args.alpha])):
            scores[OWN_STATISTICS + variant] = dice_with_own_statistics(federation, model, states)
    return scores


def dice_by_hospital(federation: train.Federation, model, progress) -> list[float]:
    """The mean Dice of each hospital's personalised model on its test images."""
    rows = train.score_inside(federation, model, progress, "iopfl", "inside")
    means = []
    for site in federation.inside:
        means.append(mean_dice([row for row in rows if row["site"] == site.name]))
    return means


def dice_with_own_statistics(federation: train.Federation, model, states: dict) -> list[float]:
    """The mean Dice of each hospital's model on its test images, if BatchNorm normalises by the
    statistics of the hospital's training images under the final weights. The running ones that
    training leaves lag behind: eight steps of momentum 0.1 keep 0.43 of the global model's."""
    device = federation.args.device
    means = []
    for site in federation.inside:
        models = [iopfl.with_state(model, states[site.name])]
        routed = router.build_routed(models)
        router.fit_to_site(routed, models, site.train.images.to(device), share=1.0)
        prediction = router.predict(routed, site.test.images.to(device)).argmax(dim=1)
        rows = train.score(federation.dataset, site, site.test, prediction, "inside", "iopfl")
        means.append(mean_dice(rows))
    return means


# ---------------------------------------------------------------- the table
def mean_dice(rows: list[dict]) -> float:
    return float(np.mean([row["dice"] for row in rows]))


def print_table(scores: dict[str, list[float]], reference: str) -> None:
    print(f"\nagainst {reference:19}  Dice    mean   least    most  wins  ties  losses       p")
    for name, values in scores.items():
        gains = 100 * (np.array(values) - scores[reference])
        wins = int((gains >= 0.1).sum())
        losses = int((gains <= -0.1).sum())
        ties = len(gains) - wins - losses
        line = f"{name:26}{100 * np.mean(values):7.2f}"
        for gain in (gains.mean(), gains.min(), gains.max()):
            line += f"{gain:+8.2f}"
        print(f"{line}{wins:6}{ties:6}{losses:8}{sign_test(wins, losses):8.2g}")


def sign_test(wins: int, losses: int) -> float:
    """How likely a split at least as uneven is by chance, on either side; ties left out."""
    n = wins + losses
    as_uneven = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1))
    return min(1.0, 2 * as_uneven / 2**n)


if __name__ == "__main__":
    main()
