"""Robust pruning: pre-train, prune and fine-tune under one objective; lowest magnitudes, or learned scores.

Sehwag, Wang, Mittal, Jana: Towards Compact and Robust Deep Neural Networks. 2019, arXiv 1906.06110. And:
HYDRA: Pruning Adversarially Robust Neural Networks. NeurIPS 2020, arXiv 2002.10509.

The idea: train for the robustness that you want, in every phase. The first paper prunes what is small (LWM),
whatever the objective; HYDRA lets the objective decide, by training importance scores before the cut.

  [A]  L: natural, pgd, trades, crown-ibp or smooth, the same in all phases; pre-train  min_w E L(w; x, y)
  [B]  m(s) = 1 for the ceil(n / ratio) largest |s| of a layer's n weights, else 0
  [C]  s = sqrt(6 / fan_in) w / max |w|           first scores: m(s) then prunes the lowest magnitudes (LWM)
  [D]  prune      min_s E L(w * m(s); x, y)       w fixed; m passes gradients on: dL/ds = sign(s) w dL/d(w m)
  [E]  fine-tune  min_w E L(w * m; x, y)          m fixed
  [F]  trades     CE(f(x), y) + beta KL(p(x) || p(x_adv)),  x_adv maximises that KL
  [G]  interval bounds: center c and radius r of a box become W c + b and |W| r; the last layer takes margins
  [H]  CROWN-IBP: margins as linear functions of x, each ReLU between two lines over its interval
  [I]  crown-ibp  CE of the logits -lower(f_y - f_j), lower = share * [H] + (1 - share) * [G]
  [J]  smooth     CE(f(x), y) + beta KL(p(x) || p(x + sigma N(0, 1)))

Sources. The text of neither paper was available: the procedure is from their abstracts, [B] to [F], [I] and
[J] from HYDRA's code, where [F] is Zhang et al. 2019 (TRADES), [H] and [I] Zhang et al. 2020, [J] Carmon et
al. 2019, whose certificate (Cohen et al. 2019) is in tools/evaluate.py. The first paper's verifiable
objective is not known; MixTrain, HYDRA's other one, is left out. The box is clamped to [0, 1], not to the
batch as in HYDRA's code. Ours: the schedules, that LWM fine-tunes for the epochs that HYDRA spends on [D],
and --scheme filter: one score a filter, first its norm; m is on what it gives after its own batch norm, and
0.001 for 0 in [D]: ReLU passes no gradient at 0, so that a pruned filter could never return.

  python hydra_prune.py --dataset digits               two minutes on two CPU cores, no network
  python hydra_prune.py --arch vgg16 --ratio 10        CIFAR-10, for a GPU; the first paper: --scores lwm
  python hydra_prune.py --arch wrn28_4 --objective trades --pretrain-epochs 100 --prune-epochs 20
      --finetune-epochs 100 --finetune-lr 0.01 --lr 0.1 --batch-size 128 --weight-decay 1e-4    HYDRA's length
1906.06110 (abstract): at ratio 10, 93 % of clean, 92.5 % of empirical robust, 85 % of verified accuracy are
preserved. HYDRA (table of results, with extra data), VGG-16 with three linear layers, CIFAR-10, robust %:
dense 51.9; ratio 10 LWM 48.8, HYDRA 49.5; ratio 100 LWM 34.3, HYDRA 41.7. What we measured is in
results/README.md.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.grad import conv2d_input

from common import (Fault, Run, apply_masks_, autocast, build_network, channel_groups, cli, evaluating,
                    interval, load_data, load_pretrained, network_of, number, one_cycle, parameter_masks,
                    per_cent, pgd, prepare, ramp, rate, remove_filters_, resize_, resolve,
                    save_model, script_parser, sgd, to_float, topk_mask, whole)

OBJECTIVES = ("natural", "pgd", "trades", "crown-ibp", "smooth")
# Ours, for crown-ibp: a network of plain layers, Adam's rate, more epochs for digits; the usual small radii.
VERIFIABLE = dict(arch="cnn_small", width=16, lr=1e-3, batch_size=128, ramp_epochs=15)
DIGITS = dict(batch_size=64, pretrain_epochs=60, prune_epochs=20, finetune_epochs=40, ramp_epochs=30)
VERIFIABLE_RADIUS = {"digits": 0.02, "mnist": 0.1, "cifar10": 2 / 255, "cifar100": 2 / 255, "svhn": 2 / 255}


def get_args(argv=None):
    parser = script_parser(__doc__, __file__, "prune_epochs")
    paper = parser.add_argument_group("robust pruning")
    paper.add_argument("--scores", choices=("lwm", "hydra"), default="hydra", help="lowest magnitude or [D]")
    paper.add_argument("--objective", choices=OBJECTIVES, default="pgd", help="of all phases")
    paper.add_argument("--scheme", choices=("irregular", "filter"), default="irregular")
    paper.add_argument("--ratio", type=number(1, 10000), default=10.0, help="units, all / kept in each layer")
    paper.add_argument("--prune-epochs", type=whole(0, 10000), help="of [D]; lwm fine-tunes as many more")
    paper.add_argument("--prune-lr", type=rate, help="of the scores (default: --lr)")
    paper.add_argument("--finetune-lr", type=rate, help="of fine-tuning (default: --lr)")
    paper.add_argument("--beta", type=number(0, 1000), help="of [F] and [J] (default: 6)")
    paper.add_argument("--final-share", type=number(0, 1), help="of CROWN-IBP in [I], from 1 (default: 0)")
    paper.add_argument("--sigma", type=number(1e-6, 100), help="noise of [J] (default: 0.25)")
    args, defaults = parser.parse_args(argv), {}
    own = {"trades": dict(beta=6.0), "smooth": dict(beta=6.0, sigma=0.25), "crown-ibp": dict(final_share=0.0)}
    own = own.get(args.objective, {})
    others = [flag for flag in ("beta", "sigma", "final_share") if flag not in own]
    parser.refuse(args, f"with --objective {args.objective}", *others)
    if args.objective == "crown-ibp":
        parser.refuse(args, "with --objective crown-ibp, which trains with Adam", "momentum")
        args.epsilon = VERIFIABLE_RADIUS.get(args.dataset) if args.epsilon is None else args.epsilon
        defaults = VERIFIABLE | (DIGITS if args.dataset == "digits" else {})
        defaults["step_size"] = args.epsilon and args.epsilon / 4
        if args.arch not in (None, "cnn_small", "cnn_large"):
            parser.error("argument --objective: crown-ibp is for --arch cnn_small and cnn_large")
        if args.amp == "on" or args.compile:
            parser.error("argument --objective: crown-ibp trains in float32 and without torch.compile")
        args.amp = "off"                                             # bounds need all digits
    args = resolve(parser, args, **own, **defaults)
    if args.scores == "lwm" or not args.prune_epochs:
        parser.refuse(args, "without epochs of training scores", "prune_lr")
    args.prune_lr, args.finetune_lr = args.prune_lr or args.lr, args.finetune_lr or args.lr
    return args


# ---------------------------------------------------------------- scores and masks

def prunable(model, scheme):
    """{name: layer} to be pruned: all convolutions and linear layers; of filters, all but the classifier."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {name: layers[name] for name in list(layers)[:-1 if scheme == "filter" else None]}


def first_score(w, scheme):
    """[C] sqrt(6 / fan_in) w / max |w|, like w (S, C, ...); of filters (S,) their norms over the largest one;
    zeros for a layer of zeros."""
    tiny = torch.finfo(w.dtype).tiny
    if scheme == "filter":
        norms = w.flatten(1).norm(dim=1)
        return norms / norms.max().clamp_min(tiny)
    return math.sqrt(6 / w[0].numel()) * w / w.abs().max().clamp_min(tiny)


def choose_mask(s, ratio):
    """[B] Boolean like s: True for exactly ceil(n / ratio) of its n entries, those of largest |s|, the first
    among equals."""
    return topk_mask(s.detach().abs().flatten(), ratio).view(s.shape)


class Scores(nn.Module):
    """[D] Importance scores s of all weights, or of all filters, and the unmasked values w, both in its
    state. The network itself holds w * m(s), so that attacks, losses and bounds are those of the pruned one.
    Of a filter, w are the weight and bias of its own batch norm, or where it has none its own, and m is not
    quite 0."""
    PRUNED_FACTOR = {"irregular": 0.0, "filter": 0.001}
    def __init__(self, model, scheme, ratio):
        super().__init__()
        self.scheme, self.ratio, self.layers, self.masked = scheme, ratio, prunable(model, scheme), []
        norms = {name: norm for writers, _, _ in channel_groups(model) for name, norm in writers.items()}
        self.s = nn.ParameterList(first_score(m.weight.detach(), scheme) for m in self.layers.values())
        for i, (name, layer) in enumerate(self.layers.items()):
            last = layer if scheme == "irregular" or not norms[name] else model.get_submodule(norms[name])
            own = [last.weight] if scheme == "irregular" or last.bias is None else [last.weight, last.bias]
            self.masked.append([(p, f"w{i}_{j}") for j, p in enumerate(own)])
            for p, buffer in self.masked[i]:
                self.register_buffer(buffer, p.detach().clone())

    def masks(self):
        """{layer: boolean like its weight}; Fault if a score is not finite."""
        if not all(s.isfinite().all() for s in self.s):
            raise Fault("a score is not finite: training has diverged (try a lower --prune-lr, or --amp off)")
        masks = {name: choose_mask(s, self.ratio) for name, s in zip(self.layers, self.s)}
        return {name: spread(mask, self.layers[name].weight) for name, mask in masks.items()}

    @torch.no_grad()
    def mask_weights_(self):
        """[B] Sets what the network holds to w * m(s)."""
        for s, masked in zip(self.s, self.masked):
            mask = choose_mask(s, self.ratio)
            for p, buffer in masked:
                w = getattr(self, buffer)
                p.copy_(torch.where(spread(mask, p), w, self.PRUNED_FACTOR[self.scheme] * w))

    @torch.no_grad()
    def collect_gradients_(self):
        """[D] dL/ds = sign(s) w dL/d(w m), of the pruned too, from the gradients that the network got; of a
        filter, whose entries have one m, their sum."""
        for s, masked in zip(self.s, self.masked):
            s.grad = torch.zeros_like(s)
            for p, buffer in masked:
                each = getattr(self, buffer) * p.grad
                s.grad += s.sign() * (each if s.shape == p.shape else each.flatten(1).sum(1))
                p.grad = None


def spread(mask, p):
    """A mask of single entries, or of filters (S,), in the shape of p (S, ...)."""
    return mask.view(-1, *[1] * (p.dim() - 1)).expand(p.shape) if mask.dim() == 1 else mask


# ---------------------------------------------------------------- sound bounds

def plain_layers(model):
    """The layers of a chain of convolutions (padded by numbers, with zeros), linear layers, ReLU and Flatten;
    Fault where no bound is known."""
    layers = list(model) if isinstance(model, nn.Sequential) else [model]
    for layer in layers:
        odd = isinstance(layer, nn.Conv2d) and (layer.padding_mode, type(layer.padding)) != ("zeros", tuple)
        if odd or not isinstance(layer, (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten)):
            raise Fault(f"no bounds are known for {type(layer).__name__}: only for convolutions with zero "
                        "padding, linear layers, ReLU and Flatten")
    if not isinstance(layers[-1], nn.Linear):
        raise Fault("no bounds are known for a network that does not end in a linear layer")
    return layers


def linear_map(layer, x, weight):
    """A layer's product with another weight and without bias, of x (N, ...)."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def interval_boxes(layers, x, epsilon):
    """[G] (lower, upper) of what enters each layer, for all inputs within epsilon of x and within [0, 1]."""
    boxes = [((x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1))]
    for layer in layers[:-1]:
        lower, upper = boxes[-1]
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            center = layer((lower + upper) / 2)
            r = linear_map(layer, (upper - lower) / 2, layer.weight.abs())
            boxes.append((center - r, center + r))
        else:                                                        # ReLU, perhaps in place, and Flatten
            monotone = F.relu if isinstance(layer, nn.ReLU) else layer
            boxes.append((monotone(lower), monotone(upper)))
    return boxes


def margin_rows(last, y):
    """Weights (N, K, F) and biases (N, K) of the margins f_y - f_j for all classes j, of a linear layer."""
    bias = last.weight.new_zeros(len(last.weight)) if last.bias is None else last.bias
    return last.weight[y][:, None] - last.weight, bias[y][:, None] - bias


def interval_margins(layers, boxes, y):
    """[G] Lower bounds (N, K) of f_y - f_j; the last layer is merged with the difference."""
    (lower, upper), (a, d) = boxes[-1], margin_rows(layers[-1], y)
    return d + (a @ ((lower + upper) / 2)[:, :, None] - a.abs() @ ((upper - lower) / 2)[:, :, None])[:, :, 0]


def crown_margins(layers, boxes, y, adaptive=True):
    """[H] Lower bounds (N, K) of f_y - f_j, passed back through the network as d + <a, layer's input>.

    An unstable ReLU on [l, u] lies below the line u (z - l) / (u - l) and above slope * z; slope is 1 or 0 as
    u or -l is larger, or, not adaptive, 0: that one is never below [G]."""
    a, d = margin_rows(layers[-1], y)                                # (N, K, ...), (N, K)
    for layer, (lower, upper) in zip(reversed(layers[:-1]), reversed(boxes[:-1])):
        if isinstance(layer, nn.ReLU):
            low, up = lower.clamp(max=0)[:, None], upper.clamp(min=0)[:, None]
            line = up / (up - low).clamp_min(torch.finfo(up.dtype).tiny)
            slope = (line > 0.5 if adaptive else low == 0).to(line) * (up > 0)
            d = d - (a.clamp(max=0) * low * line).flatten(2).sum(2)
            a = a.clamp(min=0) * slope + a.clamp(max=0) * line
        elif isinstance(layer, nn.Flatten):
            a = a.unflatten(2, lower.shape[1:])
        elif isinstance(layer, nn.Linear):
            d = d + (a @ layer.bias if layer.bias is not None else 0)
            a = a @ layer.weight
        else:
            if layer.bias is not None:
                d = d + a.sum((3, 4)) @ layer.bias
            inputs = a.shape[0] * a.shape[1], *lower.shape[1:]
            a = conv2d_input(inputs, layer.weight, a.flatten(0, 1), layer.stride, layer.padding,
                             layer.dilation, layer.groups).unflatten(0, a.shape[:2])
    (lower, upper), a = boxes[0], a.flatten(2)
    center, r = ((upper + lower) / 2).flatten(1)[:, :, None], ((upper - lower) / 2).flatten(1)[:, :, None]
    return d + (a @ center - a.abs() @ r)[:, :, 0]


def best_margins(layers, x, y, epsilon):
    """Lower bounds (N, K): the best of three sound ones, [G], [H] with both slopes."""
    boxes = interval_boxes(layers, x, epsilon)
    return torch.stack([interval_margins(layers, boxes, y), crown_margins(layers, boxes, y, False),
                        crown_margins(layers, boxes, y, True)]).amax(0)


def verify(model, images, epsilon, robust):
    """{verified_acc, verified_ci}: images (uint8 (N, C, H, W), labels (N,)) of which the bounds prove, in
    float64, that nothing within epsilon changes the class; {} for networks without known bounds. Raises Fault
    should one of them not be robust (N,), the attack's verdict: then a bound is wrong."""
    try:
        layers = plain_layers(model)
    except Fault:
        return {}
    size = max(1, 500 // layers[-1].out_features)                    # [H] holds every layer once a class
    layers = plain_layers(copy.deepcopy(model).double())
    with evaluating(model):
        verified = [(best_margins(layers, to_float(x).double(), y, epsilon).scatter(1, y[:, None], 1.0) > 0)
                    .all(1) for x, y in zip(images[0].split(size), images[1].split(size))]
    verified = torch.cat(verified)
    if (verified & ~robust).any():
        raise Fault("an image that the bounds verify was misclassified: the bounds are not sound")
    accuracy = per_cent(verified)
    return dict(verified_acc=accuracy, verified_ci=interval(accuracy, len(verified)))


# ---------------------------------------------------------------- training

def kl(logits, to):
    """KL(p || q) (N,) of p = softmax(to), q = softmax(logits)."""
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(to, 1), reduction="none", log_target=True).sum(1)


def objective(model, x, y, args, strength):
    """[A] The loss of a batch, and the logits of which the log tells how many are right. The radius and the
    step of the attack are multiplied by `strength`, and with it grows the weight of [G] in [I]."""
    epsilon, step_size = strength * args.epsilon, strength * args.step_size
    if args.objective == "crown-ibp":
        layers, share = plain_layers(model), 1 - (1 - args.final_share) * strength
        boxes = interval_boxes(layers, x, epsilon)
        margins = (1 - share) * interval_margins(layers, boxes, y)                   # [G]
        if share > 0:
            margins = margins + share * crown_margins(layers, boxes, y)              # [H]
        return F.cross_entropy(-margins, y), -margins                                # [I]
    model.eval()                                                 # the attack sees fixed batch-norm statistics
    x_near = x
    if args.objective == "pgd":
        x_near = pgd(model, x, y, epsilon, step_size, args.num_steps)
    elif args.objective == "trades":
        clean = model(x).float().detach()
        x_near = pgd(model, x, y, epsilon, step_size, args.num_steps, start=x + 0.001 * torch.randn_like(x),
                     loss=lambda logits, _: kl(logits, clean))                       # [F]
    elif args.objective == "smooth":
        x_near = x + args.sigma * torch.randn_like(x)                                # [J], not clamped
    model.train()
    if args.objective in ("natural", "pgd"):
        logits = model(x_near).float()
        return F.cross_entropy(logits, y), logits
    logits, near = model(x).float(), model(x_near).float()
    return F.cross_entropy(logits, y) + args.beta * kl(near, logits).mean(), near    # [F], [J]


def train_epoch(model, batches, optimizer, schedule, args, scores=None, masks=None, strength=lambda i: 1.0):
    """One epoch of [A]; with scores of [D], with masks of [E]; strength(i) is the objective's at batch i.
    Returns what is logged: mean loss, per cent right of the logits that the objective judges."""
    total = right = n = 0
    for step, (x, y) in enumerate(batches):
        with autocast(args):
            loss, logits = objective(model, x, y, args, strength(step))              # [A]
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
    if not math.isfinite(total):
        raise Fault("the training loss is not finite: training has diverged (try a lower --lr, or --amp off)")
    fields = dict(loss=total.item() / n, train_acc=100 * right.item() / n)
    if args.objective == "crown-ibp":
        fields["share"] = 1 - (1 - args.final_share) * strength(step)
    return fields | dict(epsilon=args.epsilon * strength(step))


def optimizer_of(module, lr, epochs, data, args):
    """SGD as in all scripts; Adam for crown-ibp, as in HYDRA's code."""
    if args.objective != "crown-ibp":
        return sgd(module, lr, epochs, data, args)
    adam = torch.optim.Adam(module.parameters(), lr, weight_decay=args.weight_decay)
    return adam, one_cycle(adam, lr, epochs * data.steps(args.batch_size))


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
    phases = dict(pretrain=args.pretrain_epochs, prune=args.prune_epochs, finetune=args.finetune_epochs)
    if args.scores == "lwm":
        phases |= dict(prune=0, finetune=args.finetune_epochs + args.prune_epochs)
    run = Run(args, data, __file__, phases, argv)
    if run.result:
        return run.result
    model, steps = prepare(model, args), data.steps(args.batch_size)

    # Phase 1: a dense robust network; the radius grows in its first epochs, step by step.
    optimizer, schedule = optimizer_of(model, args.lr, phases["pretrain"], data, args)
    for epoch in run.epochs("pretrain", model=model, optimizer=optimizer, schedule=schedule):
        def strength(step):
            return ramp(epoch * steps + step, args.ramp_epochs * steps)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, strength=strength)
        run.log(epoch=epoch + 1, **fields)
    dense = run.folder / "dense.pt"
    run.compute_once("dense", lambda: save_model(dense, run.script, "dense", network, model, args))

    # Phase 2: HYDRA trains the scores, and with them the batch norms that no score masks; LWM trains nothing.
    scores = Scores(model, args.scheme, args.ratio).to(args.device)              # [C]
    lowest = run.compute_once("lowest", lambda: {name: mask.cpu() for name, mask in scores.masks().items()})
    if phases["prune"] and not run.saved:
        scores.mask_weights_()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    trained = nn.ModuleList([scores, *norms])
    optimizer, schedule = optimizer_of(trained, args.prune_lr, phases["prune"], data, args)

    def mask_changed():
        moved = [(mask.cpu() ^ lowest[name]).sum() for name, mask in scores.masks().items()]
        return 100 * float(sum(moved)) / sum(mask.numel() for mask in lowest.values())
    for epoch in run.epochs("prune", model=model, optimizer=optimizer, schedule=schedule, scores=scores):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, scores)
        run.log(epoch=epoch + 1, **fields, mask_changed=mask_changed())
    changed = run.compute_once("changed", mask_changed)

    # Phase 3: the cut, and fine-tuning of what is left.
    def choose():
        masks = parameter_masks(model, scores.masks(), filters=args.scheme == "filter")
        return {name: mask.cpu() for name, mask in masks.items()}
    masks = {name: mask.to(args.device) for name, mask in run.compute_once("masks", choose).items()}
    apply_masks_(model, masks)                                       # [E]
    kept = {name: int(mask.sum()) for name, mask in masks.items() if name.endswith("weight")}
    if args.scheme == "filter":
        model, masks = remove_filters_(model, masks)
    model, masks = prepare(model, args), {name: mask for name, mask in masks.items() if not mask.all()}
    optimizer, schedule = optimizer_of(model, args.finetune_lr, phases["finetune"], data, args)
    for epoch in run.epochs("finetune", model=model, optimizer=optimizer, schedule=schedule):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, masks=masks)
        run.log(epoch=epoch + 1, **fields)
    save_model(run.folder / "model.pt", run.script, "compact", network, model, args)

    def extra_metrics(network, robust):
        return verify(network, data.test, args.epsilon, robust)
    result = run.finish(extra_metrics, kept=kept, mask_changed=changed)
    if args.objective == "smooth":
        print(f"certify it by: python tools/evaluate.py {run.folder}/model.pt --smoothing {args.sigma:g}")
    return result


if __name__ == "__main__":
    cli(main)
