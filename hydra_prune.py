"""Robust pruning: pre-train, prune and fine-tune under one objective; lowest magnitudes, or learned scores.

Sehwag, Wang, Mittal, Jana: Towards Compact and Robust Deep Neural Networks. 2019, arXiv 1906.06110. And:
HYDRA: Pruning Adversarially Robust Neural Networks. NeurIPS 2020, arXiv 2002.10509.

The idea: train for the robustness that you want, in every phase. The first paper prunes by magnitude (LWM),
whatever the objective; HYDRA lets the objective decide, by training importance scores before the cut.

  [A]  pre-train  min_w E L(w; x, y).  L is --objective in all phases: natural, CE(f(x), y); pgd, CE(f(x_adv),
                  y), x_adv maximising it; trades [F]; crown-ibp [J]; mixtrain [K]; smooth [L]
  [B]  m(s) = 1 for the ceil(n / ratio) largest |s| of a layer's n weights, else 0;  HYDRA's k is 1 / ratio
  [C]  s = sqrt(6 / fan_in) w / max |w|           HYDRA's scaled initialization; m(s) of it prunes the lowest
                                                  magnitudes (LWM)
  [D]  prune      min_s E L(w * m(s); x, y)  w fixed, batch norms trained;  dL/ds := sign(s) w dL/d(w m)
  [E]  fine-tune  min_w E L(w * m; x, y)          m fixed
  [F]  trades     CE(f(x), y) + beta KL(p(x) || p(x_adv)),  x_adv maximises that KL
  [G]  interval bounds: center c and radius r of a box become W c + b and |W| r; the last layer takes margins
  [H]  CROWN-IBP: margins as linear functions of x, each ReLU between two lines over its interval of [G]
  [I]  symbolic intervals: like [H], but both lines of slope u / (u - l), and l and u from such lines too
  [J]  crown-ibp  CE of the logits -lower(f_y - f_j), lower = share [H] + (1 - share) [G]; in [A] share falls
                  from 1 to --final-share (0) while the radius grows; [D] and [E] keep that
  [K]  mixtrain   CE(f(x), y) + b mix CE of -lower by [I] of --mix-images images, b = 1 with probability 0.8,
                  else 0;  mix = min(50, 0.1 * 2.5^floor(t / 5)), t: the phase's epochs at full radius
  [L]  smooth     CE(f(x), y) + beta KL(p(x) || p(x + sigma N(0, 1)))

Sources
* Neither text was available. The abstracts: the procedure. A survey (2409.01249) says that the first paper
  prunes by LWM, in steps (here each layer is cut once). That paper's verifiable objective is not known.
* HYDRA's code (inspire-group/hydra): [B] to [F], [J] to [L], and that all layers are pruned, the classifier
  too. Its adversarial objective is [F]; after [J] it fine-tunes HYDRA at 1e-5, but LWM at 5e-4.
* [F]: Zhang et al. 2019 (TRADES). [H], [J]: Zhang et al. 2020, whose setting for CIFAR-10, 2/255, keeps share
  1. [I], [K]: Wang et al. 2018 (MixTrain). [L]: Carmon et al. 2019, with its certificate (Cohen et al. 2019)
  in tools/evaluate.py.
* Ours: the default pgd, 8/255 in steps of 2/255 (theirs: 0.031, 0.0078) and 2/255 in bounds (theirs: 0.007),
  Nesterov's momentum, weight decay (theirs: 1e-4), boxes clamped to [0, 1] (theirs: to the batch's least and
  largest pixel, which can verify what is not robust), schedules (in [K] too the radius grows by steps), the
  last epoch's network (theirs: the best on the test set), the best of all bounds, no weight decay on s, [D]'s
  epochs added to LWM's fine-tuning, torch's initial values of w.
* Ours too, --scheme filter: one score per filter, at first its norm over the layer's largest; m multiplies
  its batch norm (fixed in [D], as w is) or, without one of its own, its weights, and is small instead of 0 in
  [D]: gradients still pass its ReLU.

  python hydra_prune.py --dataset digits               one or two minutes of a CPU core, offline
  python hydra_prune.py --arch vgg16 --ratio 10        CIFAR-10, for a GPU; the first paper: --scores lwm;
      this VGG-16 has one linear layer, HYDRA's three
  python hydra_prune.py --arch wrn28_4 --objective trades --pretrain-epochs 100 --prune-epochs 20
      --finetune-epochs 100 --finetune-lr 0.01 --lr 0.1 --batch-size 128 --weight-decay 1e-4    HYDRA's length
1906.06110 (abstract): ratio 10 keeps on average 93 % of clean, 92.5 % of empirical robust, 85 % of verified
accuracy (CIFAR-10, four networks). HYDRA (its code's page, extra data), WRN-28-4 as above, CIFAR-10, robust %
(PGD-50 of one start, ours has four): dense 57.2; at 10 LWM 53.8, HYDRA 55.2; at 100 LWM 37.3, HYDRA 47.3.
What we measured is in results/README.md.
"""
import copy
import functools
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from common import (RECIPES, Fault, Run, apply_masks_, autocast, build_network, channel_groups, check_finite,
                    cli, evaluating, interval, load_data, load_pretrained, make_optimizer, network_of, number,
                    parameter_masks, per_cent, pgd, prepare, progress, ramp, rank, rate, removable_groups,
                    remove_filters_, resize_, resolve, save_model, script_parser, sync, to_float, topk_mask,
                    whole, world)

OBJECTIVES = ("natural", "pgd", "trades", "crown-ibp", "mixtrain", "smooth")
BOUNDED = ("crown-ibp", "mixtrain")
TRAIN_ACC = {"pgd": "train_robust_acc", "trades": "train_robust_acc", "crown-ibp": "train_verified_acc",
             "smooth": "train_noisy_acc"}                            # what the log calls it; else train_acc
# Ours, for these: a network of plain layers, Adam's rate, more epochs for digits; the usual small radii.
VERIFIABLE = dict(arch="cnn_small", width=16, lr=1e-3, batch_size=128, ramp_epochs=15)
DIGITS = dict(batch_size=64, pretrain_epochs=60, prune_epochs=20, finetune_epochs=40, ramp_epochs=30)
VERIFIABLE_RADIUS = dict.fromkeys(RECIPES, 2 / 255) | {"digits": 0.02, "mnist": 0.1}


def get_args(argv=None):
    parser = script_parser(__doc__, __file__, "prune_epochs")
    paper = parser.add_argument_group("robust pruning (letters: see the head of the file)")
    paper.add_argument("--scores", choices=("lwm", "hydra"), default="hydra", help="lowest magnitude or [D]")
    paper.add_argument("--objective", choices=OBJECTIVES, default="pgd", help="of all phases")
    paper.add_argument("--scheme", choices=("irregular", "filter"), default="irregular")
    paper.add_argument("--ratio", type=number(1, 10000), default=10.0,
                       help="units, all / kept in each layer (default: 10)")
    paper.add_argument("--prune-epochs", type=whole(0, 10000), help="of [D]; lwm adds them to fine-tuning")
    paper.add_argument("--prune-lr", type=rate, help="of the scores (default: --lr; by bounds theirs is "
                       "1e-5, which does better on mnist)")
    paper.add_argument("--finetune-lr", type=rate, help="of fine-tuning (default: --lr)")
    paper.add_argument("--beta", type=number(0, 1000), help="of [F] and [L] (default: 6)")
    paper.add_argument("--final-share", type=number(0, 1), help="of CROWN-IBP in [J], from 1 (default: 0)")
    paper.add_argument("--mix-images", type=whole(1, 65536), help="of [K], from each process's share of a "
                       "batch (default: 5; cnn_large: 1)")
    paper.add_argument("--sigma", type=number(1e-6, 100), help="noise of [L] (default: 0.25)")
    flags = lambda recipe: " ".join(f"--{k.replace('_', '-')} {v}" for k, v in recipe.items())
    parser.epilog += (f"\nwith --objective crown-ibp, mixtrain:\n  all: {flags(VERIFIABLE)} --epsilon 2/255\n"
                      f"  digits: {flags(DIGITS)} --epsilon {VERIFIABLE_RADIUS['digits']}\n"
                      f"  mnist: --epsilon {VERIFIABLE_RADIUS['mnist']}")
    args, defaults = parser.parse_args(argv), {}
    own = {"trades": dict(beta=6.0), "smooth": dict(beta=6.0, sigma=0.25), "crown-ibp": dict(final_share=0.0),
           "mixtrain": dict(mix_images=1 if args.arch == "cnn_large" else 5)}.get(args.objective, {})
    others = {"beta", "final_share", "mix_images", "sigma"} - own.keys()
    if args.objective in ("natural", "smooth"):                      # without a radius that could grow
        others, defaults = others | {"ramp_epochs"}, dict(ramp_epochs=0)
    parser.refuse(args, f"with --objective {args.objective}", *sorted(others))
    if args.objective in BOUNDED:
        parser.refuse(args, f"with --objective {args.objective}, which trains with Adam", "momentum")
        args.epsilon = VERIFIABLE_RADIUS.get(args.dataset) if args.epsilon is None else args.epsilon
        defaults = VERIFIABLE | (DIGITS if args.dataset == "digits" else {})
        if args.arch not in (None, "cnn_small", "cnn_large"):
            parser.error(f"argument --objective: {args.objective} is for --arch cnn_small and cnn_large")
        if args.amp == "on" or args.compile:
            parser.error(f"argument --objective: {args.objective} trains in float32, without torch.compile")
        args.amp = "off"
    args = resolve(parser, args, **own, **defaults)
    if args.objective in ("natural", "smooth", *BOUNDED):
        args.step_size = args.num_steps = None                       # nothing reads them
    args.momentum = None if args.objective in BOUNDED else args.momentum
    phases = phases_of(args)
    if not phases["finetune"]:
        parser.refuse(args, "without epochs of fine-tuning", "finetune_lr")
    if not phases["prune"]:
        parser.refuse(args, "without epochs of training scores", "prune_lr")
    args.prune_lr, args.finetune_lr = args.prune_lr or args.lr, args.finetune_lr or args.lr
    return args


def phases_of(args):
    """{phase: epochs}; those of scores go to fine-tuning where no scores are trained."""
    prune = 0 if args.scores == "lwm" else args.prune_epochs
    return dict(pretrain=args.pretrain_epochs, prune=prune,
                finetune=args.finetune_epochs + args.prune_epochs - prune)


# ---------------------------------------------------------------- scores and masks

def prunable(model, scheme):
    """{name: layer} to be pruned: all convolutions and linear layers; of filters, all but the classifier."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return dict(layers[:-1] if scheme == "filter" else layers)


def first_score(w, scheme):
    """[C] sqrt(6 / fan_in) w / max |w|, like w (S, C, ...); of filters (S,) their norms over the largest."""
    s, factor = (w.flatten(1).norm(dim=1), 1) if scheme == "filter" else (w, math.sqrt(6 / w[0].numel()))
    return factor * s / s.abs().max().clamp_min(torch.finfo(w.dtype).tiny)


def choose_mask(s, ratio):
    """[B] Boolean like s, True for exactly ceil(n / ratio) of its n entries: those of largest |s|, the first
    among equals."""
    return topk_mask(s.detach().abs().flatten(), ratio).view(s.shape)


def spread(mask, like):
    """A mask of single weights as it is, one of filters (S,) in the shape of `like` (S, ...)."""
    return mask.view(mask.shape + (1,) * (like.dim() - mask.dim())).expand_as(like)


class Scores(nn.Module):
    """[D] Importance scores s of all weights, or of all filters, and the unmasked values w, both in its
    state. The network itself holds w * m(s), so that attacks, losses and bounds are those of the pruned one.
    Of a filter, m multiplies the weight and bias of its batch norm, and is 0.001 where pruned; without one it
    multiplies its own, and is 1e-6: too small for a batch norm on the sum (eps 1e-5) to amplify again."""
    def __init__(self, model, scheme, ratio):
        super().__init__()
        self.ratio, self.layers, self.carriers = ratio, prunable(model, scheme), []
        groups = channel_groups(model) if scheme == "filter" else ()
        norms = {name: norm for writers, _, _ in groups for name, norm in writers.items()}
        self.s = nn.ParameterList(first_score(m.weight.detach(), scheme) for m in self.layers.values())
        self.w = nn.ParameterList()
        for i, (name, layer) in enumerate(self.layers.items()):
            masked, small = [layer.weight], 0.0                      # what m multiplies, and m where pruned
            if scheme == "filter":
                norm = model.get_submodule(norms[name] or name)      # or the layer itself
                masked = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
                small = 1e-6 if norm is layer else 0.001
            self.carriers += [(i, p, small) for p in masked]             # i: the score's place
            self.w.extend(nn.Parameter(p.detach().clone(), requires_grad=False) for p in masked)

    def masks(self):
        """{layer: boolean like its weight}; Fault if a score is not finite."""
        check_finite("a score", *self.s)
        return {name: spread(choose_mask(s, self.ratio), layer.weight)
                for s, (name, layer) in zip(self.s, self.layers.items())}

    @torch.no_grad()
    def mask_weights_(self):
        """[B] Sets what the network holds to w * m(s)."""
        for w, (i, p, small) in zip(self.w, self.carriers):
            p.copy_(torch.where(spread(choose_mask(self.s[i], self.ratio), p), w, small * w))

    @torch.no_grad()
    def collect_gradients_(self):
        """[D] dL/ds = sign(s) w dL/d(w m), of the pruned too, from the gradients that the network got; of a
        filter, whose entries have one m, their sum."""
        for s in self.s:
            s.grad = torch.zeros_like(s)
        for w, (i, p, _) in zip(self.w, self.carriers):
            s, each = self.s[i], w * p.grad
            s.grad += s.sign() * (each if s.shape == p.shape else each.flatten(1).sum(1))
            p.grad = None


# ---------------------------------------------------------------- sound bounds

def plain_layers(model):
    """The layers of a chain that ends in a linear one; Fault where no bound is known of one of them."""
    layers = list(model) if type(model) is nn.Sequential else [model]         # a subclass may differ
    for layer in layers:
        odd = isinstance(layer, nn.Conv2d) and (layer.padding_mode, type(layer.padding)) != ("zeros", tuple)
        if odd or type(layer) not in (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten):
            raise Fault(f"no bounds are known for {type(layer).__name__}: only for convolutions with zero "
                        "padding, linear layers, ReLU and Flatten")
    if not isinstance(layers[-1], nn.Linear):
        raise Fault("no bounds are known for a network that does not end in a linear layer")
    if hasattr(model, "mean"):                                       # the normalisation, as a layer
        first = nn.Conv2d(len(model.mean), len(model.mean), 1, groups=len(model.mean),
                          device=model.mean.device, dtype=model.mean.dtype)
        first.weight.data, first.bias.data = 1 / model.std[:, None], (-model.mean / model.std).flatten()
        layers = [first.requires_grad_(False), *layers]
    return layers


def interval_boxes(layers, x, epsilon):
    """[G] (lower, upper) of what enters each layer, for all inputs within epsilon of x and within [0, 1]."""
    boxes = [((x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1))]
    for layer in layers[:-1]:
        lower, upper = boxes[-1]
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            center = layer((lower + upper) / 2)
            absolute = {name: p.abs() if name == "weight" else torch.zeros_like(p)
                        for name, p in layer.named_parameters()}
            r = functional_call(layer, absolute, (upper - lower) / 2)
            boxes.append((center - r, center + r))
        else:                                                        # ReLU, perhaps in place, and Flatten
            monotone = F.relu if isinstance(layer, nn.ReLU) else layer
            boxes.append((monotone(lower), monotone(upper)))
    return boxes


def linear_bounds(layers, boxes, a, slope, corner=()):
    """[H] Lower bounds (N, K) of <a, f(x)> over the box boxes[0], f being `layers`, and upper ones, which
    hold for slope "line" alone. From the last layer back, a (N or 1, K, ...) becomes that of its input.
    A ReLU on l < 0 < u lies between slope * z and line * z + offset, line = u / (u - l), offset = -line * l;
    slope: "half", 1 if line > 1/2, else 0; "zero", 0 (never below [G]); "line", as the upper one: [I].
    Of a feature map, a may be a window, outside which it is zero; `corner` is where that begins."""
    d = gap = 0                                                      # gap: from lower to upper bounds
    def window(box):
        spans = (slice(first, first + n) for first, n in zip(corner, a.shape[3:]))
        return box[(..., *spans)]
    for layer, (lower, upper) in reversed([*zip(layers, boxes)]):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            bias = layer.bias.view(-1, *(1 for _ in a.shape[3:])).expand(a.shape[2:])
            d = d + a.flatten(2) @ bias.flatten()
        if isinstance(layer, nn.Flatten):
            a, corner = a.unflatten(2, lower.shape[1:]), (0, 0)
        elif isinstance(layer, nn.Linear):
            a = a @ layer.weight
        elif isinstance(layer, nn.Conv2d):
            back = F.conv_transpose2d(a.flatten(0, 1), layer.weight, None, layer.stride, 0, 0, layer.groups,
                                      layer.dilation)                # with the padding, cut off below
            first = [c * s - p for c, s, p in zip(corner, layer.stride, layer.padding)]      # < 0: padding
            spans = (slice(max(0, -i), max(0, n - i)) for i, n in zip(first, lower.shape[2:]))
            a, corner = back.unflatten(0, a.shape[:2])[(..., *spans)], [max(0, i) for i in first]
        else:
            low, up = window(lower).clamp(max=0), window(upper).clamp(min=0)
            line = up / (up - low).clamp_min(torch.finfo(up.dtype).tiny)
            offset, line = (line * -low).flatten(1)[:, :, None], line[:, None]
            positive, negative = a.clamp(min=0), a.clamp(max=0)
            d = d + (negative.flatten(2) @ offset)[:, :, 0]
            if slope == "line":
                gap = gap + (a.abs().flatten(2) @ offset)[:, :, 0]
            below = line if slope == "line" else (line > 0.5 if slope == "half" else line == 1).to(line)
            a = positive * below + negative * line                   # a > 0: the lower line, a < 0: the upper
    lower, upper = (window(end).flatten(1)[:, :, None] for end in boxes[0])          # (N, pixels, 1)
    center = (a.flatten(2) @ ((upper + lower) / 2))[:, :, 0]
    r = (a.flatten(2).abs() @ ((upper - lower) / 2))[:, :, 0]
    return d + (center - r), d + gap + (center + r)


def margins(layers, boxes, y, slope=None):
    """Lower bounds (N, K) of f_y - f_j: [H]; without slope [G], from the box before the last layer alone."""
    first, eye = -1 if slope is None else 0, boxes[0][0].new_ones(layers[-1].out_features).diag()
    return linear_bounds(layers[first:], boxes[first:], eye[y][:, None] - eye, slope)[0]


def symbolic_margins(layers, boxes, y, room=None):
    """[I] Lower bounds (N, K) of f_y - f_j, after bounds of all units before ReLUs, of a few units at a time:
    tensors hold about `room` numbers. Units of a feature map go by squares, because close ones see few
    pixels. MixTrain's code goes forward, with a symbol a pixel and ReLU: the bounds are the same."""
    room, side = (room or 2**25, 8) if y.is_cuda else (room or 2**22, 2)     # a GPU wants few, large tensors
    boxes, some = list(boxes), max(1, room // max(lower.numel() for lower, _ in boxes))
    for i, layer in enumerate(layers[:-1]):
        if isinstance(layer, nn.ReLU) and i > 1:                     # [G] is exact for one layer
            shape, bound, ends = boxes[i][0].shape[1:], linear_bounds, []
            units = torch.arange(shape.numel(), device=y.device).view(shape)
            if units.numel() > some * (3 if y.is_cuda else 30):      # else training would keep all parts
                bound = functools.partial(checkpoint, bound, use_reentrant=False, preserve_rng_state=False)
            for corner in itertools.product(*(range(0, n, side) for n in shape[1:])):
                square = units[(slice(None), *(slice(first, first + side) for first in corner))]
                for part in square.flatten().split(some):
                    a = (part[:, None] == square.flatten()).to(boxes[i][0]).view(1, -1, *square.shape)
                    ends.append((part, *bound(layers[:i], boxes[:i], a, "line", corner)))
            part, *ends = (torch.cat(end, -1) for end in zip(*ends))
            boxes[i] = [end[:, part.argsort()].view(-1, *shape) for end in ends]
    return margins(layers, boxes, y, "line")


def cheap_margins(layers, boxes, y):
    """Lower bounds (N, K): the best of three sound ones, [G], [H] with slopes of both kinds."""
    return torch.stack([margins(layers, boxes, y, slope) for slope in (None, "zero", "half")]).amax(0)


def verify(model, images, epsilon, robust):
    """{verified_acc, verified_ci} of images (uint8 (N, C, H, W), labels (N,)) for which the bounds prove, in
    float64, that nothing within epsilon changes the class; {} for networks without known bounds. [I] is slow,
    above all for cnn_large (--eval-images takes fewer): it gets what the others leave open of the images that
    the attack left robust (N,). Fault if any other image is verified: a bound is then wrong."""
    exact = copy.deepcopy(model).double()
    try:
        layers = plain_layers(exact)
    except Fault:
        return {}
    verified, many = torch.zeros_like(robust), max(1, 500 // layers[-1].out_features)     # 500 margins
    with evaluating(exact):
        for bound, among, size in ((cheap_margins, torch.ones_like(robust), many),
                                   (symbolic_margins, robust, 8)):
            left = (among & ~verified).nonzero()[:, 0]
            parts = left.split(size)[rank()::world()] if len(left) else ()           # this process's share
            for part in progress(parts, "bounds", len(parts)):
                x, y = to_float(images[0][part]).double(), images[1][part]
                lower = bound(layers, interval_boxes(layers, x, epsilon), y).scatter(1, y[:, None], math.inf)
                least = 1e-5 * exact(x).abs().amax(1, True)          # float32, which attacks see, rounds more
                verified[part] = (lower > least).all(1)
            sync(dist.all_reduce, verified, dist.ReduceOp.MAX)
    if (verified & ~robust).any():
        raise Fault("an image that the bounds verify was misclassified: the bounds are not sound")
    return dict(verified_acc=per_cent(verified), verified_ci=interval(per_cent(verified), len(verified)))


# ---------------------------------------------------------------- training

def kl(p_logits, q_logits):
    """KL(p || q) (N,) of the softmax p and q of logits (N, K)."""
    log_p, log_q = F.log_softmax(p_logits, 1), F.log_softmax(q_logits, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def objective(model, x, y, args, strength, mix=0.1):
    """[A] The loss of a batch, and the logits by which the log counts correct images. `strength` multiplies
    the attack's radius and step, and with it grows [G]'s share in [J]; mix is [K]'s."""
    epsilon = strength * args.epsilon
    if args.objective == "crown-ibp":
        layers, share = plain_layers(model), 1 - (1 - args.final_share) * strength
        boxes = interval_boxes(layers, x, epsilon)
        lower = (1 - share) * margins(layers, boxes, y)                              # [G]
        if share > 0:
            lower = lower + share * margins(layers, boxes, y, "half")                # [H]
        return F.cross_entropy(-lower, y), -lower                                    # [J]
    if args.objective == "mixtrain":
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if torch.rand(()) < 0.8:                                     # drawn on the CPU: no GPU has to wait
            some, layers = torch.randint(len(x), (args.mix_images,), device=x.device), plain_layers(model)
            lower = symbolic_margins(layers, interval_boxes(layers, x[some], epsilon), y[some])  # [I]
            loss = loss + mix * F.cross_entropy(-lower, y[some])                     # [K]
        return loss, logits
    model.eval()                                                 # the attack sees fixed batch-norm statistics
    x_near = x
    if args.objective == "pgd":
        x_near = pgd(model, x, y, epsilon, strength * args.step_size, args.num_steps)
    elif args.objective == "trades":
        clean = model(x).float().detach()
        x_near = pgd(model, x, y, epsilon, strength * args.step_size, args.num_steps,
                     start=x + 0.001 * torch.randn_like(x), loss=lambda logits, _: kl(clean, logits))    # [F]
    elif args.objective == "smooth":
        x_near = x + args.sigma * torch.randn_like(x)                                # [L], not clamped
    model.train()
    if args.objective in ("natural", "pgd"):
        logits = model(x_near).float()
        return F.cross_entropy(logits, y), logits
    logits, near = model(x).float(), model(x_near).float()
    return F.cross_entropy(logits, y) + args.beta * kl(logits, near).mean(), near    # [F], [L]


def train_epoch(model, batches, optimizer, schedule, args, scores=None, masks=None,
                strength_at=lambda i: 1.0, t=0):
    """One epoch of [A]; with scores of [D], with masks of [E]; strength_at(i) is the objective's strength in
    batch i, t that of [K]. Returns what is logged: mean loss, per cent right (by [J]: proven to be)."""
    mix = min(50.0, 0.1 * 2.5 ** min(7, max(t, 0) // 5))             # [K]; beyond 2.5^7 it is 50 anyway
    total = right = n = 0
    for step, (x, y) in enumerate(batches):
        with autocast(args):
            loss, logits = objective(model, x, y, args, strength_at(step), mix)      # [A]
        total, right, n = total + loss.detach() * len(y), right + (logits.argmax(1) == y).sum(), n + len(y)
        model.zero_grad()                                            # in [D] the optimizer has no weights
        loss.backward()
        if scores:
            scores.collect_gradients_()                              # [D]
        optimizer.step()
        schedule.step()
        if scores:
            scores.mask_weights_()                                   # [B]
        if masks:
            apply_masks_(model, masks)                               # [E]
    check_finite("the training loss", total)
    strength, fields = strength_at(step), dict(loss=total.item() / n)
    fields[TRAIN_ACC.get(args.objective, "train_acc")] = 100 * right.item() / n
    if args.objective == "crown-ibp":
        fields["share"] = 1 - (1 - args.final_share) * strength
    if args.objective == "mixtrain":
        fields["mix"] = mix
    if args.objective not in ("natural", "smooth"):
        fields["epsilon"] = args.epsilon * strength
    return fields


def build(artifact):
    """The network of a model.pt or dense.pt: with the layers' stored sizes; weights loaded strictly."""
    return resize_(build_network(**artifact["network"]), artifact["state"])


def main(argv=None):
    args = get_args(argv)
    data = load_data(args)
    network = network_of(args, data)
    model = build_network(**network)
    if args.pretrained:
        load_pretrained(model, args.pretrained, network)
    if args.scheme == "filter":
        removable_groups(model, network)                             # Fault, where that cannot be
    phases = phases_of(args)
    run = Run(args, data, __file__, phases, argv)
    if run.result:
        return run.result
    bounded = args.objective in BOUNDED                              # Adam, as in HYDRA's code; no TF32
    model = prepare(model, args, tf32=not bounded)
    steps = data.steps(args.batch_size)

    # Phase 1: a dense robust network; the radius grows in its first epochs, step by step.
    optimizer, schedule = make_optimizer(model, args.lr, phases["pretrain"], data, args, bounded)
    for epoch in run.epochs("pretrain", model=model, optimizer=optimizer, schedule=schedule):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, t=epoch - args.ramp_epochs,
                             strength_at=lambda i: ramp(epoch * steps + i, args.ramp_epochs * steps))
        run.log(epoch=epoch + 1, **fields)
    dense = run.folder / "dense.pt"
    run.compute_once("dense", lambda: save_model(dense, run.script, "dense", network, model, args))

    # Phase 2: HYDRA trains the scores, and with them the batch norms that no score masks; LWM trains nothing.
    scores = Scores(model, args.scheme, args.ratio)                  # [C]
    lwm_masks = run.compute_once("lowest", lambda: {n: mask.cpu() for n, mask in scores.masks().items()})
    if phases["prune"] and not run.saved:
        scores.mask_weights_()
    norms = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))   # masked: no .grad
    optimizer, schedule = make_optimizer(norms, args.prune_lr, phases["prune"], data, args, bounded, scores.s)

    def mask_changed():
        moved = [(mask.cpu() ^ lwm_masks[name]).sum() for name, mask in scores.masks().items()]
        return 100 * float(sum(moved)) / sum(mask.numel() for mask in lwm_masks.values())
    for epoch in run.epochs("prune", model=model, optimizer=optimizer, schedule=schedule, scores=scores):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, scores, t=epoch)
        run.log(epoch=epoch + 1, **fields, mask_changed=mask_changed())
    changed = run.compute_once("changed", mask_changed)

    # Phase 3: the cut, and fine-tuning of what is left.
    masks = run.compute_once("masks", lambda: {name: mask.cpu() for name, mask in parameter_masks(
        model, scores.masks(), filters=args.scheme == "filter").items()})
    masks = {name: mask.to(args.device) for name, mask in masks.items()}
    apply_masks_(model, masks)                                       # [E]
    # Counted by each layer's own mask: removing filters removes inputs of the next layers too.
    kept = {name: int(mask.sum()) for name, mask in masks.items() if name.endswith("weight")}
    if args.scheme == "filter":
        model, masks = remove_filters_(model, masks)
    model = prepare(model, args, tf32=not bounded)
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    optimizer, schedule = make_optimizer(model, args.finetune_lr, phases["finetune"], data, args, bounded)
    for epoch in run.epochs("finetune", model=model, optimizer=optimizer, schedule=schedule):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, masks=masks, t=epoch)
        run.log(epoch=epoch + 1, **fields)
    save_model(run.folder / "model.pt", run.script, "compact", network, model, args)
    return run.finish(lambda model, robust: verify(model, data.test, args.epsilon, robust), kept=kept,
                      mask_changed=changed)


if __name__ == "__main__":
    cli(main)
