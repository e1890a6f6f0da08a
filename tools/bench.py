"""Times training steps on random images: naive, as the scripts do it, compiled, with what a paper adds.
Or, with --models, what saved networks take to classify, in several forms.

  python tools/bench.py                                     ResNet-18 at full width, batch 128, PGD-10
  python tools/bench.py --compile --device cuda             the compiled step too
  python tools/bench.py --models runs/DIR/dense.pt runs/DIR/model.pt       inference; by ONNX Runtime
      too, where onnx, onnxscript and onnxruntime are installed
"""
import contextlib
import copy
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import admm_prune  # noqa: E402
import binary_relax
import cstar
import hydra_prune
from common import (NETWORKS, Data, Parser, UsageFault, build_network, check_device, cli, count_macs, latency,
                    make_optimizer, normalised, parameter_masks, peak_memory, prepare, progress, read_model,
                    to_float, whole)


def get_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--arch", choices=NETWORKS, default="resnet18")
    parser.add_argument("--width", type=whole(1, 64), default=16)
    parser.add_argument("--batch-size", type=whole(2, 65536), default=128)
    parser.add_argument("--num-steps", type=whole(0, 10000), default=10, help="PGD steps")
    parser.add_argument("--rounds", type=whole(1, 1000), default=5, help="of which medians are taken")
    parser.add_argument("--amp", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--compile", action="store_true", help="time the compiled step or model too")
    parser.add_argument("--models", nargs="+", metavar="FILE",
                        help="time inference of these networks, all others over the first, and nothing else")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def seconds_of(function, device):
    """How long function() takes, on the device too."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda _: None
    wait(device)
    begin = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - begin


def naive_step(model, optimizer, x, y, epsilon, step_size, num_steps):
    """Adversarial training as it is often written: float32, train mode throughout, and gradients of all
    weights in every step of the attack."""
    model.train()
    x_adv = (x + epsilon * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(num_steps):
        x_adv.requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = x_adv.clamp(x - epsilon, x + epsilon).clamp(0, 1)
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    optimizer.step()


def bench_steps(args, device):
    """The functions to be timed, {name: one training step}; {paper: (name of the step without it, its update
    or None)}; whether they use bfloat16."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pair = images.to(device), torch.randint(0, 10, (args.batch_size,), generator=generator).to(device)
    data, batch = Data(pair, pair, list("0123456789")), (to_float(pair[0]), pair[1])
    flags = [f"--{k.replace('_', '-')}={getattr(args, k)}" for k in
             ("arch", "width", "batch_size", "num_steps", "amp")] + [f"--device={device}"]

    def step_of(script, with_method=lambda model: {}, *more):
        """One step of a script's training, on a network of its own."""
        settings = script.get_args([*flags, *more])
        torch.manual_seed(0)
        model = prepare(build_network(args.arch, args.width, 3, 10, (32, 32)), settings)
        extra = with_method(model)
        optimizer, schedule = make_optimizer(extra.pop("trained", model), 1e-4, 10**6, data, settings)
        return lambda: script.train_epoch(model, [batch], optimizer, schedule, settings, **extra)

    def factors(model):
        layers = cstar.factorisable(model)
        weights = {name: m.weight.detach().cpu() for name, m in layers.items()}
        ranks = cstar.choose_ranks(weights, cstar.budget_of(model, 8), "hull")
        admm = cstar.ADMM(layers, ranks, 0.1)
        papers["cstar"] = "default", admm.update
        return dict(penalty=admm.penalty)

    def filters(model):
        def choose(parameters):
            weights = {name: parameters[f"{name}.weight"] for name in admm_prune.prunable(model)}
            return parameter_masks(model, admm_prune.choose_masks(weights, "filter", 4), filters=True)
        admm = admm_prune.ADMM(model, choose, 0.1)
        papers["admm_prune"] = "default", admm.update
        return dict(penalty=admm.penalty)

    def scores(model):
        found = hydra_prune.Scores(model, "irregular", 10).to(device)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        return dict(scores=found, trained=nn.ModuleList([found, *norms]))

    def quantised(model):
        return dict(weights=list(binary_relax.quantisable(model).values()), lam=2.0)

    papers = {"hydra_prune": ("hydra_prune without", None), "binary_relax": ("binary_relax without", None)}
    torch.manual_seed(0)
    plain, settings = build_network(args.arch, args.width, 3, 10, (32, 32)).to(device), cstar.get_args(flags)
    optimizer = torch.optim.SGD(plain.parameters(), 1e-4, 0.9)
    inputs = batch[0].contiguous(), batch[1], settings.epsilon, settings.step_size, settings.num_steps
    steps = {"naive": lambda: naive_step(plain, optimizer, *inputs), "default": step_of(cstar)}
    if args.compile:
        steps["compiled"] = step_of(cstar, lambda model: {}, "--compile")
    with contextlib.suppress(UsageFault):                            # too narrow for that ratio
        steps["cstar"] = step_of(cstar, factors)
    return steps | {"admm_prune": step_of(admm_prune, filters), "hydra_prune without": step_of(hydra_prune),
                    "hydra_prune": step_of(hydra_prune, scores),
                    "binary_relax without": step_of(binary_relax),
                    "binary_relax": step_of(binary_relax, quantised)}, papers, settings.amp


def saved_for_backward(model, x):
    """Bytes that a forward pass over x keeps for the backward pass, parameters not counted (but autocast's
    copies of them are)."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def limits(args, step, bfloat16, device):
    """What the hardware allows: GFLOP/s of products of matrices (n, n) in the types used, GFLOP of a training
    step, as it must be and in naive form, how much faster the former is at those rates, bytes that a forward
    pass saves for the backward one, and where `step` spends its time."""
    n, rates, precision = 2048 if device == "cpu" else 16384, {}, torch.get_float32_matmul_precision()
    tf32 = device != "cpu" and torch.backends.cudnn.allow_tf32       # as in the naive step's convolutions
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    for kind in ("float32", "bfloat16")[:1 + bfloat16]:              # some CPUs take minutes for the latter
        a, b = torch.rand(2, n, n, device=device).to(getattr(torch, kind))
        rates[kind] = round(2e-9 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5)))
    torch.set_float32_matmul_precision(precision)
    model = build_network(args.arch, args.width, 3, 10, (32, 32)).to(device)
    forward = 2e-9 * args.batch_size * count_macs(model, dict(channels=3, size=(32, 32)))
    work = dict(naive=3 * forward * (args.num_steps + 1), default=forward * (2 * args.num_steps + 3))
    x = torch.rand(args.batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bfloat16):
        kept = saved_for_backward(model.train(), x)
    with torch.profiler.profile() as profile:
        step()
    kind, clock = ("CPU", "self_cpu_time_total") if device == "cpu" else ("CUDA", "self_device_time_total")
    found = sorted(((getattr(e, clock), e.key) for e in profile.key_averages()
                    if e.device_type.name == kind and not e.is_user_annotation), reverse=True)
    total = sum(spent for spent, _ in found)
    rate = rates["bfloat16" if bfloat16 else "float32"]
    bound = work["naive"] / rates["float32"] / (work["default"] / rate)
    return dict(matrix_gflop_per_second=rates, gflop_a_step={k: float(f"{v:.4g}") for k, v in work.items()},
                times_naive_at_these_rates=round(bound, 2), saved_for_backward_bytes=kept,
                profile_per_cent={key: round(100 * spent / total, 1) for spent, key in found[:8]})


def folded(model):
    """A copy with batch norms in the convolutions before them, and the normalisation, which fuse() loses."""
    mean_std = [getattr(model, k).flatten().tolist() for k in ("mean", "std") if hasattr(model, k)]
    return normalised(fuse(model), *mean_std or (None, None)).to(next(model.parameters()).device)


def bench_inference(args, device):
    """Milliseconds a forward pass, without training (random weights), of the dense network, of CSTAR's at
    ratio 16 by both rank rules and by its budget of MACs, and of one with a quarter of the filters, near
    ratio 16, where the width allows these; batch norm as it is, and folded."""
    torch.manual_seed(0)
    network = dict(channels=3, size=(32, 32))
    dense = build_network(args.arch, args.width, 3, 10, (32, 32)).eval()
    models, weights = dict(dense=dense), {n: m.weight.detach() for n, m in cstar.factorisable(dense).items()}
    places = cstar.positions(dense, network)
    for name, rule, cost in (("hull", "hull", None), ("macs", "hull", places), ("uniform", "uniform", None)):
        with contextlib.suppress(UsageFault):
            budget = cstar.budget_of(dense, 16, cost, count_macs(dense, network) if cost else 0)
            ranks = cstar.choose_ranks(weights, budget, rule, cost)
            models[f"cstar {name}"] = cstar.factorise_(copy.deepcopy(dense), ranks).eval()
    if args.width % 4 == 0 and not args.arch.startswith("imagenet_"):
        models["filters"] = build_network(args.arch, args.width // 4, 3, 10, (32, 32)).eval()
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    macs = {name: count_macs(m, network) for name, m in models.items()}
    models |= {f"{name}, folded": folded(m) for name, m in models.items()}
    for model in models.values():
        model.to(device, memory_format=torch.channels_last)
    return dict(params_ratio={name: round(sizes["dense"] / n, 1) for name, n in sizes.items()},
                macs_ratio={name: round(macs["dense"] / n, 1) for name, n in macs.items()},
                **{f"batch_{batch}_ms": dict(zip(models, latency(models.values(), network, batch, device)))
                   for batch in (1, 128)})


def by_onnx(model, x):
    """The model by ONNX Runtime on the CPU, for inputs like x, with as many threads as PyTorch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    file = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def bench_files(paths, device, with_compile):
    """Milliseconds a forward pass of saved networks, float32, by {batch: {form: {file: ms}}}, and for the
    files after the first how many times they are as fast. All files of a form take turns."""
    if len(set(paths)) < len(paths):
        raise UsageFault("argument --models: a file is named twice")
    artifacts, models = zip(*map(read_model, paths))
    network, result = artifacts[0]["network"], {}
    for path, artifact in zip(paths, artifacts):
        if any(artifact["network"][k] != network[k] for k in ("channels", "size")):
            raise UsageFault(f"argument --models: {path} takes other images than {paths[0]}")
    forms = {"plain": lambda m, x: m, "folded": lambda m, x: folded(m),
             "exported": lambda m, x: torch.export.export(m, (x,)).module()}
    try:
        [*map(folded, models)]
    except (TypeError, ValueError, RuntimeError):                    # torch.fx cannot trace, say, noise
        del forms["folded"]
    if with_compile:                                                 # beyond the limit it would run as plain
        torch._dynamo.config.recompile_limit = 8 + 2 * len(models)
        forms["compiled"] = lambda m, x: torch.compile(m, dynamic=False)
    if device == "cpu" and all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        forms["onnxruntime"] = by_onnx
    for batch in (1, 128):
        x = to_float(torch.zeros((batch, network["channels"], *network["size"]), device=device))
        for form, of in forms.items():
            with torch.no_grad():
                made = [of(m.to(device, memory_format=torch.channels_last), x) for m in models]
            times = latency(made, network, batch, device)
            result.setdefault(f"batch_{batch}", {})[form] = dict(
                ms=dict(zip(paths, times)), times_as_fast=[round(times[0] / t, 2) for t in times[1:]])
    return dict(device="cpu" if device == "cpu" else torch.cuda.get_device_name(device),
                threads=torch.get_num_threads(), torch=torch.__version__, inference=result)


def main(argv=None):
    """Times one training step in its naive form, as the scripts have it and, with --compile, compiled; and
    with what each paper adds. All take turns; printed are medians over the rounds, of times and of ratios,
    beside what the hardware allows; and what compact networks gain in inference."""
    args = get_args(argv)
    device = check_device(args.device)
    if args.models:
        result = bench_files(args.models, device, args.compile)
        print(json.dumps(result, indent=1))
        return result
    steps, papers, bfloat16 = bench_steps(args, device)
    times, memory = {name: [] for name in steps}, {}
    for turn in range(args.rounds + 1):                              # the first warms up, and compiles
        for name, step in progress(list(steps.items()), f"round {turn}/{args.rounds}", len(steps)):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            times[name].append(seconds_of(step, device))
            memory[name] = None if device == "cpu" else torch.cuda.max_memory_allocated(device) - before
    times = {name: t[1:] for name, t in times.items()}

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(times[a], times[b]))

    result = dict(arch=args.arch, width=args.width, batch_size=args.batch_size, num_steps=args.num_steps,
                  device="cpu" if device == "cpu" else torch.cuda.get_device_name(device),
                  threads=torch.get_num_threads(), torch=torch.__version__, rounds=args.rounds,
                  bfloat16_but_in_naive=bfloat16, steps={}, added_per_cent={},
                  tf32_in_naive=device != "cpu" and torch.backends.cudnn.allow_tf32)
    for name, t in times.items():
        middle = statistics.median(t)
        result["steps"][name] = dict(
            seconds=round(middle, 4), images_per_second=round(args.batch_size / middle, 1),
            times_naive=round(ratio("naive", name), 2), gpu_bytes_above_resident=memory[name])
    per_epoch = 50000 / args.batch_size
    for name, (without, update) in papers.items():
        result["added_per_cent"][name] = added = {"a step": round(100 * (ratio(name, without) - 1), 1)}
        if update:
            took = statistics.median(seconds_of(update, device) for _ in range(3))
            added |= {"update_seconds": round(took, 3), "an update each 50,000 images": round(
                100 * took / per_epoch / statistics.median(times[without]), 2)}
    result |= dict(hardware=limits(args, steps["default"], bfloat16, device),
                   inference=bench_inference(args, device), memory_bytes=peak_memory())
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    cli(main)
