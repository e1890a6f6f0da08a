"""Evaluates a saved network: clean, under PGD, with sanity flags; on request by other attacks, certified.

  python tools/evaluate.py runs/DIR/model.pt        what result.json says, if the run had --seed 0 and no
      --eval-images, or these are given again
  python tools/evaluate.py runs/DIR/model.pt --losses ce --constant-step --eval-step-size 2/255  Madry's PGD
  python tools/evaluate.py runs/DIR/model.pt --source OTHER.pt   PGD examples made on another network
  python tools/evaluate.py runs/DIR/model.pt --autoattack        needs the package pyautoattack
  python tools/evaluate.py runs/DIR/model.pt --smoothing 0.25    certified l2 radii at that noise
"""
import copy
import importlib.util
import itertools
import json
import math
import os
import sys
from pathlib import Path
from statistics import NormalDist

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (LOSSES, Parser, UsageFault, balanced, batched, check_device, cli,  # noqa: E402
                    evaluate, evaluating, evaluation_batch, fraction_correct, interval, is_random, load_data,
                    logits_of, number, per_cent, pgd, progress, radius, read_model, sanity_flags, to_float,
                    whole)


def get_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("model", help="a model.pt or dense.pt")
    parser.add_argument("--dataset", help="default: the one it was made for, and so for the attack")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--workers", type=whole(1, 256), default=8,
                        help="decoding threads; for photos, processes")
    parser.add_argument("--eval-images", type=whole(0),
                        help="a balanced subset, 0: all (default: on a CPU 1000, else all)")
    parser.add_argument("--epsilon", type=radius, help="a new one scales the stored step too")
    parser.add_argument("--eval-step-size", "--step-size", dest="step_size", type=radius, help="first step")
    parser.add_argument("--constant-step", action="store_true", help="as in Madry's PGD; else it is annealed")
    parser.add_argument("--eval-steps", type=whole(1, 10000))
    parser.add_argument("--restarts", type=whole(1, 1000))
    parser.add_argument("--eot", type=whole(1, 1000), help="passes a gradient, with noise (default: 10)")
    parser.add_argument("--losses", choices=LOSSES, nargs="+",
                        help="of the restarts, in turn (default: both); margin is Carlini and Wagner's")
    parser.add_argument("--source", help="another saved network, whose PGD examples are tried too")
    parser.add_argument("--autoattack", action="store_true", help="needs the package pyautoattack")
    parser.add_argument("--smoothing", type=number(1e-6, 100), help="sigma of the noise to certify with")
    parser.add_argument("--smoothing-images", type=whole(1), help="balanced subset (default: 100)")
    parser.add_argument("--smoothing-draws", type=whole(100, 10**7), help="an image (default: 10000)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--device", default="auto")
    parser.set_defaults(train_images=0)                              # all, of which none is used
    args = parser.parse_args(argv)
    if not args.smoothing:
        parser.refuse(args, "without --smoothing", "smoothing_images", "smoothing_draws")
    if args.constant_step and args.step_size is None:
        parser.error("argument --constant-step: needs --eval-step-size; what annealing begins with is large")
    if args.autoattack and not importlib.util.find_spec("pyautoattack"):
        parser.error("argument --autoattack: the package pyautoattack is not installed")
    return args


# ---------------------------------------------------------------- other attacks

def transfer(model, source, images, *, epsilon, step_size, num_steps, anneal=True, eot=10, seed=0):
    """Accuracy in per cent under PGD examples made on another network, `source`; of random networks as in
    evaluate()."""
    with evaluating(source, model, seed=seed) as generator:
        eot, draws = (n if is_random(m, images[0]) else 1 for m, n in ((source, eot), (model, 10)))
        more = dict(eot=eot, anneal=anneal, generator=generator)
        pairs = ((pgd(source, x, y, epsilon, step_size, num_steps, **more), y) for x, y in batched(*images))
        return per_cent(torch.cat([fraction_correct(model, x_adv, y, draws) for x_adv, y in pairs]))


def autoattack(model, images, *, epsilon, seed=0):
    """Accuracy in per cent under AutoAttack (Croce and Hein 2020; optional pyautoattack), and its version.
    It targets 9 classes an image, or all others; it needs four classes or more."""
    from pyautoattack import AutoAttack
    with evaluating(model, seed=seed):
        x, y = to_float(images[0]).contiguous(), images[1]       # its gradients may not be channels last
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        version = "rand" if is_random(model, images[0]) else "standard"
        judge = AutoAttack(model, eps=epsilon, norm="Linf", version=version, seed=seed, device=x.device)
        classes = logits_of(model, x[:1]).shape[1]
        judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = min(9, classes - 1)
        with torch.enable_grad():
            x_adv, found = judge.run_standard_evaluation(x, y, batch_size=evaluation_batch(x))
        again = torch.cat([logits_of(model, x).argmax(1) for x in x_adv.split(evaluation_batch(x))])
        return per_cent((again == y) & (found == y)), version


# ---------------------------------------------------------------- randomised smoothing (Cohen et al. 2019)

def clopper_pearson(count, n, alpha):
    """One-sided lower confidence bound of a probability of which `count` of n draws were hits: the p for
    which `count` or more of n are as likely as alpha. Bisection on the binomial tail, in float64."""
    if count == 0:
        return 0.0
    k = torch.arange(count, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = torch.logsumexp(ways + k * math.log(p) + (n - k) * math.log1p(-p), 0)
        low, high = (p, high) if tail < math.log(alpha) else (low, p)
    return low


def certify(model, image, generator, *, sigma, draws, selection=100, alpha=0.001, classes=10):
    """(class, l2 radius) of the smoothed network at one image (C, H, W); (None, 0.0) if it abstains. The
    class is chosen with `selection` draws, others give the bound, which fails with probability alpha."""
    def votes(n):
        total = torch.zeros(classes, dtype=torch.long, device=image.device)
        most = min(1000, max(1, 2**24 // image.numel()))             # of photos fewer: they fill memory
        for size in [most] * (n // most) + [n % most] * (n % most > 0):
            noise = torch.randn((size, *image.shape), generator=generator, device=image.device)
            noisy = (image + sigma * noise).contiguous(memory_format=torch.channels_last)      # never clamped
            total += logits_of(model, noisy).argmax(1).bincount(minlength=classes)
        return total
    best = int(votes(selection).argmax())
    p = clopper_pearson(int(votes(draws)[best]), draws, alpha)
    return (best, sigma * NormalDist().inv_cdf(p)) if p > 0.5 else (None, 0.0)


def smoothing_curve(model, images, *, sigma, count=100, draws=10000, classes=10, seed=0):
    """Certified accuracy of the smoothed network, in per cent, against the l2 radius; to abstain is to be
    wrong. Another norm and another classifier than those of robust_acc."""
    chosen = balanced(images[1].cpu().numpy(), min(count, len(images[1])))
    x, y = to_float(images[0][chosen]), images[1][chosen].tolist()
    with evaluating(model, seed=seed) as generator:
        found = [certify(model, image, generator, sigma=sigma, draws=draws, classes=classes)
                 for image in progress(x, "certified images", len(x))]
    reach = [r if label == true else -1.0 for (label, r), true in zip(found, y)]
    radii = [round(0.05 * i, 2) for i in itertools.takewhile(lambda i: 0.05 * i <= max(reach), range(10**4))]
    return dict(norm="l_2", sigma=sigma, draws=draws, selection=100, alpha=0.001, images=len(y),
                abstained=sum(label is None for label, _ in found),
                curve={f"{r:.2f}": round(100 * sum(mine >= r for mine in reach) / len(y), 2) for r in radii})


# ---------------------------------------------------------------- the program

def check_fit(artifact, flag, args, data):
    """UsageFault unless the artifact's network is for images and classes like those of the data set."""
    here = dict(channels=data.test[0].shape[1], classes=len(data.classes), size=list(data.test[0].shape[2:]))
    if here != {k: artifact["network"][k] for k in here}:
        raise UsageFault(f"argument {flag}: {args.dataset} has {here}, and the network {artifact['network']}")


def main(argv=None):
    args = get_args(argv)
    artifact, model = read_model(args.model)
    stored = artifact["attack_settings"]
    if args.epsilon is not None and args.step_size is None:
        share = stored["step_size"] / stored["epsilon"] if stored["epsilon"] else 1.0
        args.step_size = min(1.0, share * args.epsilon)
    for key, value in stored.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.losses and args.restarts < len(args.losses):
        raise UsageFault(f"argument --losses: {len(args.losses)} need as many --restarts")
    args.losses = args.losses or [*LOSSES]
    args.device = check_device(args.device)
    data = load_data(args)
    check_fit(artifact, "--dataset", args, data)
    if args.autoattack and len(data.classes) < 4:
        raise UsageFault("argument --autoattack: needs four classes or more, and "
                         f"{args.dataset} has {len(data.classes)}")
    model.to(args.device, memory_format=torch.channels_last)
    if args.source:
        other, source = read_model(args.source)
        check_fit(other, "--source", args, data)
        source.to(args.device, memory_format=torch.channels_last)
    attack = dict(epsilon=args.epsilon, step_size=args.step_size, num_steps=args.eval_steps, seed=args.seed,
                  eot=args.eot or 10, anneal=not args.constant_step)
    result = dict(model=args.model, script=artifact["script"], kind=artifact["kind"], dataset=args.dataset,
                  bytes=os.path.getsize(args.model),
                  **evaluate(model, data.test, restarts=args.restarts, losses=args.losses, **attack),
                  flags=sanity_flags(model, data.test, **attack))
    if args.source:
        result["transfer_acc"] = transfer(model, source, data.test, **attack)
        if result["robust_acc"] - result["transfer_acc"] > max(2, 300 / result["images"]):
            result["flags"].append("transfer is stronger than PGD")
    if args.autoattack:
        accuracy, version = autoattack(model, data.test, epsilon=args.epsilon, seed=args.seed)
        result |= dict(autoattack_acc=accuracy, autoattack_ci=interval(accuracy, result["images"]),
                       autoattack_version=version)
    if args.smoothing:
        result["smoothed"] = smoothing_curve(
            model, data.test, sigma=args.smoothing, count=args.smoothing_images or 100,
            draws=args.smoothing_draws or 10000, classes=len(data.classes), seed=args.seed)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    cli(main)
