"""Binary-Relax: robust networks with weights of 1, 2 or 4 bits, on ResNets with noise, by a trade-off loss.

Li, Wang, Xin: An Integrated Approach to Produce Robust Models with High Efficiency. 2020, revised 2023, arXiv
2008.13305. It joins EnResNet (Wang, Yuan, Shi, Osher, NeurIPS 2019, arXiv 1811.10745) with Binary-Relax (Yin,
Zhang, Lyu, Osher, Qi, Xin, arXiv 1801.06313).

The idea: keep float weights, but run the network at a point between them and their quantised values, which
moves to the latter with every epoch and ends there. Training is adversarial, with noise, and the loss has a
term for clean images too.

  [A]  f(x) = 1/n sum_i net_i(x);  in net_i, after every residual block,  h <- h + a std(h) N(0, 1)
  [B]  q = Proj(v) = s c in Q, one scale s >= 0 per tensor, codes c of few values:
         1 bit    c = sign(v);  s = mean |v|
         2 bits   (ternary) c = sign(v) where |v| >= 0.7 mean |v|, else 0;  s = mean |v| over those kept
         m bits   |c| = min(M, ceil(|v| / s0 - 1/2)), M = 2^(m-1) - 1, s0 = 2 max |v| / (2 M + 1);
                  s = <|v|, |c|> / <c, c>
  [C]  w = (lam q + v) / (lam + 1), where the network runs: the proximal point of lam/2 dist(w, Q)^2 if q is
         the point of Q nearest to v. For 1 bit it is; the rules of 2 and 4 bits miss it: of 36,864 Gaussian
         weights the squared error is 1.01 times the least at 2 bits (1.8 by the authors' scale), about 2 at 4
  [D]  v <- SGD(v, dL/dw):  the gradient is taken at w, the step, its momentum and weight decay act on v
  [E]  lam = 350^(t / switch) in epoch t = 0, 1, ... (theirs: 1.05^t, switch 120); from t = switch on w = q
  [F]  L = 8 CE(f_w(x_adv), y) + 1 CE(f_w(x), y),  x_adv by PGD on f_w;  (9) in their README
  [G]  input channel k of a layer is dead if W[:, k] = 0;  ours: if no layer reads it, its writer is removed
The latent weights are v here; x, y are always image and label.

Sources
* Its authors' code (lzj994/Binary-Quantization), Binary-Relax's (penhunt/binaryrelax) and EnResNet's
  (BaoWangMath/EnResNet): [A] to [G]; the body of 2008.13305 was not available. As there, all convolutions but
  the 1x1 shortcuts are quantised, the first too (and in the networks of common.py hidden linear layers), the
  rest stays float; noise is on in training, in attacks and in evaluation; [F] is not normalised, so that its
  step is nine times that of --adv-weight 1 --nat-weight 0.
* What differs there: std is that of the batch, so that an image's logits depend on its neighbours (here that
  of each image); the 2-bit scale is a mean over all weights, zeros too, which is no projection; sign(0) is 0
  (here 1); Delta = 0.7 mean |v| and s0 / 2 have caps, 100 and 10; the clean images pass first; PGD runs in
  training mode, and its iterates enter batch norm's running statistics (here it sees those, and they stay);
  the network is the best on test images that are cropped (here q of the last v); SGD is not Nesterov's.
* Ours: one cycle of the rate over both phases, in which it is at half of its peak at the switch (theirs falls
  in steps and is at a hundredth: --finetune-lr); pre-training, as in Binary-Relax's demo (theirs: none, which
  here makes dense.pt the untrained network); without fine-tuning, batch norm's statistics anew at q, on clean
  images; with noise, attacks on gradients averaged over --eot draws, judged by the mean over 10 new draws on
  the worst of all restarts, and the flag for random output.
In an EnResNet only channels between the two convolutions of a block can be removed, a part of the dead ones.

  python binary_relax.py --dataset digits --bits 2     four minutes of one CPU core, offline
  python binary_relax.py --depth 56 --bits 4           CIFAR-10, En1ResNet56, for a GPU
  python binary_relax.py --depth 56 --bits 4 --pretrain-epochs 0 --relax-epochs 120 --finetune-epochs 80
      --relax-lr 0.1 --finetune-lr 0.001 --batch-size 128 --epsilon 0.031 --step-size 0.007
The last has the authors' length and attack, and as peaks their rates before and after the switch. Their
README, channel sparsity by (9) (bits not said): En1ResNet56 on CIFAR-10 33.18 %, En2ResNet56 on CIFAR-100
43.94 % and on SVHN 49.03 %, En1ResNet110 on CIFAR-100 23.93 %. No accuracy of theirs is known to us. What we
measured is in results/README.md.
"""
import contextlib
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (CIFAR, RECIPES, Fault, Run, UsageFault, WideBlock, autocast, build_network, check_finite,
                    cli, conv3x3, evaluate, load_data, load_pretrained, make_optimizer, network_of,
                    normalised, number, per_cent, pgd, prepare, ramp, rate, reestimate_batchnorm_,
                    removable_groups, resize_, resolve, save_model, script_parser, stages, whole,
                    without_channels)


def get_args(argv=None):
    def adapt(recipe):
        """EnResNet, and the authors' share of relaxed epochs, 120 of 200."""
        epochs = recipe["compress_epochs"] + recipe["finetune_epochs"]
        relaxed = round(0.6 * epochs)
        arch = recipe["arch"] if recipe["arch"].startswith("imagenet") else "enresnet"
        return dict(arch=arch, width=max(8, recipe["width"]), compress_epochs=relaxed,
                    finetune_epochs=epochs - relaxed)
    parser = script_parser(__doc__, __file__, "relax_epochs", ["enresnet"], adapt)
    parser.set_defaults(eval_steps=None)                             # with noise fewer: see below
    paper = parser.add_argument_group("Binary-Relax, EnResNet and the trade-off loss")
    paper.add_argument("--eot", type=whole(1, 1000), help="evaluation's passes a gradient (default: 10)")
    paper.add_argument("--bits", type=int, choices=(1, 2, 4, 32), default=2,
                       help="per weight; 32 is float (default: 2)")
    paper.add_argument("--method", choices=("br", "bc"), default="br",
                       help="bc, BinaryConnect without its clipping: w = q always")
    paper.add_argument("--relax-epochs", type=whole(0, 10000), help="before the switch to quantised weights")
    paper.add_argument("--relax-lr", type=rate, help="peak rate of both later phases (default: --lr / 2)")
    paper.add_argument("--finetune-lr", type=rate,
                       help="instead: peak after the switch, a cycle of its own (theirs: --relax-lr / 100)")
    paper.add_argument("--adv-weight", type=number(0, 1000), default=8.0,
                       help="of adversarial images (default: 8)")
    paper.add_argument("--nat-weight", type=number(0, 1000), default=1.0, help="of clean ones (default: 1)")
    paper.add_argument("--depth", type=whole(8, 1202), help="6 b + 2 layers of an enresnet (default: 20)")
    paper.add_argument("--members", type=whole(1, 100), help="networks in an enresnet (default: 1)")
    paper.add_argument("--noise", type=number(0, 10), help="a of an enresnet (default: 0.1)")
    args = parser.parse_args(argv)
    recipe = parser.recipes.get(args.dataset, parser.recipes["cifar10"])
    ensemble = (args.arch or recipe["arch"]) == "enresnet"
    own = dict(depth=20, members=1, noise=0.1)
    if not ensemble:
        parser.refuse(args, "without --arch enresnet", *own)
        own = dict(width=RECIPES.get(args.dataset, CIFAR)["width"])
    if not args.adv_weight:
        parser.refuse(args, "without adversarial images", "step_size", "num_steps", "ramp_epochs")
    resolve(parser, args, longest_ramp=lambda args: 0 if args.pretrained else (
        args.pretrain_epochs + args.relax_epochs + args.finetune_epochs), **own)
    if not args.finetune_epochs:
        parser.refuse(args, "without epochs of fine-tuning", "finetune_lr")
    if not args.relax_epochs and (args.finetune_lr or not args.finetune_epochs):
        parser.refuse(args, "without epochs that have this rate", "relax_lr")
    args.relax_lr = args.relax_lr or args.lr / 2
    if ensemble and args.depth % 6 != 2:
        parser.error(f"argument --depth: {args.depth} is not 6 b + 2, such as 20, 56 or 110")
    if not args.adv_weight + args.nat_weight:
        parser.error("argument --nat-weight: not both weights can be 0")
    if args.bits == 32 and args.method == "bc":
        parser.error("argument --method: bc has no meaning for --bits 32, float weights")
    if args.eot and not args.noise:
        parser.error("argument --eot: is for networks with --noise")
    if not args.adv_weight:
        args.step_size, args.num_steps, args.ramp_epochs = None, None, 0             # nothing reads them
    args.eval_steps = args.eval_steps or (20 if args.noise else 50)
    args.eot = args.eot or (10 if args.noise else None)
    return args


# ---------------------------------------------------------------- the network

class NoisyBlock(WideBlock):
    """A pre-activation residual block, then noise [A]."""
    def __init__(self, c_in, c_out, stride, noise):
        super().__init__(c_in, c_out, stride)
        self.noise = noise

    def forward(self, x):
        out = super().forward(x)
        return add_noise(out, self.noise) if self.noise else out


def add_noise(h, a):
    """[A] h (B, C, H, W) + a std(h) N(0, 1), std that of each image; drawn anew in every pass, in
    training or not. Gradients flow through std."""
    b, c, height, width = h.shape
    flat, dtype = h.permute(0, 2, 3, 1).flatten(1), torch.promote_types(h.dtype, torch.float32)     # (B, n)
    n = flat.shape[1]
    # torch.std is far slower on a CPU; the error of this is below 1 % while |mean| <= 100 std.
    mean, norm = flat.mean(1, dtype=dtype), torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    std = ((norm.square() / n - mean.square()).clamp(min=0) * n / (n - 1) + 1e-12).sqrt()
    noise = torch.randn(b, height, width, c, device=h.device).permute(0, 3, 1, 2)    # channels last
    return h + (a * std).to(h.dtype).view(b, 1, 1, 1) * noise.to(h.dtype)


class PreActResNet(nn.Module):
    """A CIFAR ResNet of depth 6 b + 2: three stages of b blocks with width, 2 width, 4 width channels."""
    def __init__(self, depth, width, channels, classes, noise):
        super().__init__()
        self.conv1, widths = conv3x3(channels, width), (width, width, 2 * width, 4 * width)
        parts = stages(lambda *sizes: NoisyBlock(*sizes, noise), depth // 6, widths)
        self.blocks = nn.Sequential(*(block for stage in parts for block in stage))
        self.bn, self.fc = nn.BatchNorm2d(4 * width), nn.Linear(4 * width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.weight[0, 0].numel() * m.out_channels)))

    def forward(self, x):
        h = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(h.mean((2, 3)))


class EnResNet(nn.Module):
    """[A] The mean of the members' logits; they share no weights, and each draws noise of its own."""
    def __init__(self, depth, members, noise, width, channels, classes):
        super().__init__()
        self.members = nn.ModuleList(PreActResNet(depth, width, channels, classes, noise)
                                     for _ in range(members))

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


def make_network(arch, size, mean=None, std=None, **network):
    """An EnResNet, or a network of common.py."""
    if arch != "enresnet":
        return build_network(arch, size=size, mean=mean, std=std, **network)
    if min(size) < 4:
        raise UsageFault(f"argument --arch: enresnet is too deep for {size[0]}x{size[1]}; its least is 4")
    return normalised(EnResNet(**network), mean, std)


def build(artifact):
    """The network of a model.pt or dense.pt."""
    state = dict(artifact["state"])
    packed, shapes, bits = (artifact.get(key) for key in ("codes", "shapes_of_codes", "bits_of_codes"))
    for name, codes in unpack(packed, shapes or {}, bits).items():
        state[name] = state.pop(f"{name}.scale") * codes
    return resize_(make_network(**artifact["network"]), state)


# ---------------------------------------------------------------- the method

def quantisable(model):
    """{name: weight} of all convolutions but those in shortcuts, and of hidden linear layers."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    classifiers = [m.fc for m in model.members] if isinstance(model, EnResNet) else [layers[-1][1]]
    shortcuts = [m for name, m in layers if {"shortcut", "downsample"} & set(name.split("."))]
    return {f"{name}.weight": m.weight for name, m in layers if m not in classifiers + shortcuts}


def project(v, bits):
    """[B] codes, like v, and the scale (); q = scale * codes. All-zero v has scale 0."""
    a = v.abs()
    if bits == 1:
        return torch.where(v < 0, -1.0, 1.0).to(v), a.mean()
    if bits == 2:
        kept = a >= 0.7 * a.mean()
        return v.sign() * kept, (a * kept).sum() / kept.sum()
    levels = 2**(bits - 1) - 1                                       # M
    step = (2 * a.max() / (2 * levels + 1)).clamp(min=torch.finfo(v.dtype).tiny)     # s0
    codes = (a / step - 0.5).ceil().clamp(0, levels)
    return v.sign() * codes, (a * codes).sum() / codes.square().sum().clamp(min=1)


def relax(v, bits, lam):
    """[C] w, a new tensor; lam = inf gives q."""
    codes, scale = project(v, bits)
    return scale * codes if math.isinf(lam) else (lam * scale * codes + v) / (lam + 1)


@contextlib.contextmanager
def relaxed(weights, bits, lam):
    """Within it the parameters in `weights` hold w [C]; afterwards, whatever happened, v as before."""
    latent = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w, v in zip(weights, latent):
                w.copy_(relax(v, bits, lam))
        yield
    finally:
        with torch.no_grad():
            for w, v in zip(weights, latent):
                w.copy_(v)


def sparsity(weights):
    """Per cent of zero weights, and of dead input channels (linear: features) [G], of tensors (S, C, ...)."""
    zero = torch.cat([(w == 0).flatten() for w in weights])
    dead = torch.cat([(w == 0).transpose(0, 1).flatten(1).all(1) for w in weights])
    return dict(sparsity=per_cent(zero), channel_sparsity=per_cent(dead))


def without_dead(model, state, network):
    """[G] The state without the channels that no layer reads; at least one channel of a group stays. In an
    EnResNet these are channels within blocks: those between blocks also enter the noise and the sum."""
    groups = [({f"{name}.conv1": f"{name}.bn2"}, [], [f"{name}.conv2"])
              for name, m in model.named_modules() if isinstance(m, NoisyBlock)]
    if not isinstance(model, EnResNet):
        with contextlib.suppress(Fault):                             # then nothing is removed
            groups = removable_groups(model, network)
    for group in reversed(groups):                               # a removed reader may leave its inputs dead
        writers, _, readers = group
        count = len(state[f"{next(iter(writers))}.weight"])
        read = [state[f"{name}.weight"].flatten(1).T.reshape(count, -1) for name in readers]
        alive = torch.cat(read, 1).any(1)                            # (channels,), of (channels, all readers)
        alive[0] |= not alive.any()
        state = without_channels(state, [group], [alive])
    return state


def pack(codes, bits):
    """Codes, a list of tensors of project's -> uint8 (bytes,): `bits` each, every tensor padded to bytes."""
    packed = [torch.empty(0, dtype=torch.uint8)]
    for c in codes:
        c = (c.flatten() > 0 if bits == 1 else c.flatten() + 2**(bits - 1) - 1).to(torch.uint8)
        each = np.unpackbits(c[:, None].numpy(), 1, bits, "little")                  # (n, bits)
        packed.append(torch.from_numpy(np.packbits(each, bitorder="little")))
    return torch.cat(packed)


def unpack(packed, shapes, bits):
    """What pack was given, {name: float tensor} of those shapes; ValueError where the bytes do not fit."""
    codes = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        size = -(-count * bits // 8)
        if size > len(packed):
            raise ValueError("codes are missing")
        part, packed = packed[:size], packed[size:]
        each = np.unpackbits(part.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
        c = torch.from_numpy(np.packbits(each, 1, "little")).float().view(shape)
        codes[name] = 2 * c - 1 if bits == 1 else c - (2**(bits - 1) - 1)
    if shapes and len(packed):
        raise ValueError(f"{len(packed)} bytes of codes too many")
    return codes


def encode(model, bits, network):
    """q of a network that holds v, as build() reads it: the state, with scales instead of quantised weights
    and without dead channels; the codes, packed; and the sparsity of q, in per cent."""
    state = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    targets, scales = quantisable(model), {}
    coded = targets if bits < 32 else ()
    if bits < 32 and len([*model.named_parameters(remove_duplicate=False)]) > len([*model.parameters()]):
        raise Fault("layers that share a weight cannot be saved as codes")
    for name in coded:
        check_finite(name, state[name])
        state[name], scale = project(state[name], bits)                  # [B]
        scales[f"{name}.scale"] = scale[None]
    found = sparsity([state[name] * scales.get(f"{name}.scale", 1) for name in targets])
    state = without_dead(model, state, network)
    codes = {name: state.pop(name) for name in coded}
    return state | scales, dict(codes=pack(codes.values(), bits), bits_of_codes=bits,
                                shapes_of_codes={name: list(c.shape) for name, c in codes.items()}), found


# ---------------------------------------------------------------- training

def train_epoch(model, batches, optimizer, schedule, args, weights=(), lam=math.inf, strength=1.0):
    """One epoch in which the parameters `weights` are relaxed [C]; with none, training is of float weights.
    The attack's radius and step are multiplied by `strength`. Returns what is logged: mean loss [F], per cent
    right on the adversarial images of training, and on clean ones where they are in the loss."""
    share = dict(robust=args.adv_weight, clean=args.nat_weight)
    right, total, n = {}, 0, 0
    for x, y in batches:
        with relaxed(weights, args.bits, lam):                       # [C]
            with autocast(args):
                model.eval()                                     # the attack sees fixed batch-norm statistics
                images = {}
                if share["robust"]:
                    images["robust"] = pgd(model, x, y, strength * args.epsilon, strength * args.step_size,
                                           args.num_steps)
                if share["clean"]:
                    images["clean"] = x
                model.train()
                logits = {name: model(batch) for name, batch in images.items()}
            loss = sum(share[name] * F.cross_entropy(out.float(), y) for name, out in logits.items())    # [F]
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()                                             # [D]: .grad is at w, weights are v again
        schedule.step()
        total, n = total + loss.detach() * len(y), n + len(y)
        for name, out in logits.items():
            right[name] = right.get(name, 0) + (out.argmax(1) == y).sum()
    check_finite("the training loss", total)
    return dict(loss=total.item() / n, **{f"train_{k}_acc": 100 * r.item() / n for k, r in right.items()})


def main(argv=None):
    args = get_args(argv)
    data = load_data(args)
    network = network_of(args, data)
    if args.arch == "enresnet":
        network |= dict(depth=args.depth, members=args.members, noise=args.noise)
    model = make_network(**network)
    if args.pretrained:
        load_pretrained(model, args.pretrained, network)
    phases = dict(pretrain=args.pretrain_epochs, relax=args.relax_epochs, finetune=args.finetune_epochs)
    run = Run(args, data, __file__, phases, argv)
    if run.result:
        return run.result
    model = prepare(model, args)
    weights = list(quantisable(model).values()) if args.bits < 32 else []

    # Phase 1: a dense robust network of float weights. The radius may grow over all phases.
    optimizer, schedule = make_optimizer(model, args.lr, args.pretrain_epochs, data, args)
    for epoch in run.epochs("pretrain", model=model, optimizer=optimizer, schedule=schedule):
        strength = ramp(epoch, args.ramp_epochs)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, strength=strength)
        run.log(epoch=epoch + 1, **fields, strength=strength)
    dense = run.folder / "dense.pt"
    run.compute_once("dense", lambda: save_model(dense, run.script, "dense", network, model, args))

    def zeros():                                                     # of q, for the log
        return sparsity([project(w.detach(), args.bits)[0] for w in weights]) if weights else {}

    # Phase 2: relaxed weights, ever nearer to quantised ones. The model holds v between the steps.
    epochs = args.relax_epochs + (0 if args.finetune_lr else args.finetune_epochs)
    optimizer, schedule = make_optimizer(model, args.relax_lr, epochs, data, args)
    states = dict(model=model, optimizer=optimizer, schedule=schedule)
    for epoch in run.epochs("relax", **states):
        lam = 350 ** (epoch / args.relax_epochs) if args.method == "br" else math.inf                # [E]
        strength = ramp(args.pretrain_epochs + epoch, args.ramp_epochs)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, weights, lam, strength)
        fields |= {"lam": lam} if weights and args.method == "br" else {}
        run.log(epoch=epoch + 1, **fields, **zeros(), strength=strength)

    # Phase 3: after the switch, quantised weights; lam = inf. Without epochs here batch norm lags behind q.
    if weights and not args.finetune_epochs and not run.saved:
        with relaxed(weights, args.bits, math.inf):
            reestimate_batchnorm_(model, data.batches(args.batch_size, run.generator),
                                  min(200, data.steps(args.batch_size)))
    if args.finetune_lr:
        optimizer, schedule = make_optimizer(model, args.finetune_lr, args.finetune_epochs, data, args)
        states |= dict(optimizer=optimizer, schedule=schedule)
    for epoch in run.epochs("finetune", **states):
        strength = ramp(args.pretrain_epochs + args.relax_epochs + epoch, args.ramp_epochs)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, weights, strength=strength)
        run.log(epoch=epoch + 1, **fields, **zeros(), strength=strength)

    # The file: q of the last v, as codes and scales.
    state, codes, found = encode(model, args.bits, network)
    save_model(run.folder / "model.pt", run.script, "compact", network, model, args, state=state, **codes)

    def extra_metrics(model, robust):
        """The authors' FGSM and I-FGSM (20 steps; theirs of 1/255 at 0.031), one pass per gradient; for C&W
        in l2, its loss in l_inf. The clean form counts too, and without noise every iterate."""
        attack = dict(epsilon=args.epsilon, random_start=False, anneal=False, restarts=1, seed=args.seed)
        step, eot = args.epsilon / 8, args.eot or 1
        attacks = dict(fgsm=dict(step_size=args.epsilon, num_steps=1, eot=1),
                       ifgsm=dict(step_size=step, num_steps=20, eot=1),
                       margin=dict(step_size=step, num_steps=20, eot=eot, losses=["margin"]))
        results = {name: evaluate(model, data.test, **attack, **more) for name, more in attacks.items()}
        accuracies = {f"{name}_{k}": r[f"robust_{k}"] for name, r in results.items() for k in ("acc", "ci")}
        return accuracies | dict(attacks={name: r["attack"] for name, r in results.items()})
    return run.finish(extra_metrics, **found)


if __name__ == "__main__":
    cli(main)
