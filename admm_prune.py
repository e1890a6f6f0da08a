"""ADMM pruning at the same time as adversarial training: filters, columns or single weights.

Ye, Xu, Liu, Cheng, Lambrechts, Zhang, Zhou, Ma, Wang, Lin: Adversarial Robustness vs. Model Compression, or
Both? ICCV 2019, arXiv 1903.12561 (equation numbers are those of its second version).

The idea: a small network does not become robust, a large one does; so prune while training adversarially,
and let ADMM pull the weights towards sparse ones, so that the final cut costs little.

  [A]  min_W  E max_{|d| <= epsilon} loss(f_W(x + d), y)    s.t. W_l = Z_l in S_l        Eq. (3); PGD: (2)
  [B]  S_l: at most ceil(n_l / ratio) of layer l's n_l filters, columns or weights are not zero    Sec. 3.1
  [C]  project(V): the units of largest norm stay as they are, the others become zero              Sec. 3.1
  [D]  W <- SGD (the paper: Adam) on  loss(f_W(x_adv), y) + rho/2 sum_l ||W_l - Z_l + U_l||^2       Eq. (8)
  [E]  Z <- project(W + U),  every --admm-interval epochs                                          Eq. (10)
  [F]  U <- U + W - Z        then; at first U = 0, Z = project(W)          Algorithm 1, in its scaled form
  [G]  W <- project(W), the pruned stay zero; then trained on like [A], with a fresh optimizer
  [H]  of filters, W_l is the weight, its bias and the batch norm's scale and shift: all that the cut zeroes;
       which filters stay depends on the weights alone, as in the paper: Z is then not the nearest point
C: input channels, k: kernel; a column of the matrix (filters, C k k) is a position (c, i, j) in all filters.
The baselines of --mode have as many epochs: post cuts the dense network at once (appendix A); scratch trains
a network of --target-width; ticket trains the filters, columns or weights that ADMM kept from their initial
values.

Sources
* The paper: [A] to [E], and that every layer is pruned alike. It prints [F] as U + rho (W - Z), which does
  not agree with its (8) and (10); its code has this form. In its (2) the gradient is at x, where the iterate
  is meant; its Algorithm 1 has, taken literally, one batch an iteration. Its theta is W, its rho 1e-3.
* Its code (yeshaokai/Robustness-Aware-Pruning-ADMM): [E]'s interval in epochs, [G], and that the classifier
  stays whole (in its example for a robust LeNet the hidden linear layer too). What differs there: examples
  multiply rho by 1.3 at each update and leave U as it is (here U shrinks as rho grows); U keeps an autograd
  graph, so that after m updates the penalty pulls 1 + m times as hard as [D]; the attack is in training mode,
  so that every step of PGD moves batch norm's statistics (here fixed meanwhile); of filters the weights alone
  are pulled (by bn_filter the batch norm's scales alone), and its shift lives on: a pruned filter still gives
  a constant.
* Ours: [H], because batch norm undoes the shrinking of a whole filter, so that pulling its weights alone does
  not prepare the cut; rho's default, all schedules, SGD in all phases (on MNIST the paper pre-trains by Adam,
  its code retrains by it too), Nesterov's momentum, weight decay (theirs: 1e-4, on MNIST 1e-6), torch's
  initial weights (their MNIST LeNet's convolutions: Xavier's), the last epoch's network (theirs: the best on
  the test set), the reading of --mode ticket, removing dead filters, --group-residual: only with it does a
  ResNet-18 pruned 16 -> 4 become as small as one of width 4.
Note: [G] keeps the dense network's running statistics. With our rho the masks of digits hardly change
(mask_changed in the log): Z prunes what cutting at once would. While the rate is still low W cannot follow
and U grows, so that what is to be pruned crosses zero before it fades (results/README.md, with --admm-rise
0 and a growing rho too).

  python admm_prune.py --dataset digits                one or two minutes of a CPU core, offline
  python admm_prune.py --arch resnet18 --target-width 4                 CIFAR-10, 16 -> 4, for a GPU
  python admm_prune.py --arch resnet18 --target-width 4 --pretrain-epochs 300 --admm-epochs 270
      --admm-interval 9 --finetune-epochs 300 --batch-size 128 --rho 1e-3
The last has the paper's 300 epochs of pre-training, K = 30 updates and rho, the code's batch size, and the
interval of its docstring (its examples: 20, 4); the rest of its numbers is ours. The paper, clean / PGD-10
robust % (Table 4): ResNet-18 of width 16 82.71 / 49.31, of width 4 from scratch 77.35 / 44.99, pruned 16 -> 4
78.85 / 47.19, cut at once (Table A1) 78.59 / 46.17; 16 -> 1 64.17 / 37.99, cut at once 60.26 / 36.18. Table
2, LeNet, PGD-40: width 8 98.85 / 93.51, 4 98.15 / 91.38, 8 -> 4 98.87 / 94.27. What we measured is in
results/README.md.
"""
import math
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Run, UsageFault, apply_masks_, autocast, build_network, check_finite, cli, load_data,
                    load_pretrained, make_optimizer, network_of, number, parameter_masks, pgd, prepare, ramp,
                    rate, read_artifact, removable_groups, remove_filters_, resize_, resolve, save_model,
                    script_parser, topk_mask, whole)

# How each mode spends the epochs p + a + f of pre-training, ADMM and fine-tuning: the sum is the same.
MODES = {
    "admm": lambda p, a, f: (p, a, f),                           # the paper's method
    "post": lambda p, a, f: (p, 0, a + f),                       # cut at once, its appendix A
    "scratch": lambda p, a, f: (p + a + f, 0, 0),                # first hypothesis: only the size matters
    "ticket": lambda p, a, f: (0, 0, p + a + f)}                 # second: size and inherited initial values


def get_args(argv=None):
    parser = script_parser(__doc__, __file__, "admm_epochs")
    paper = parser.add_argument_group("ADMM pruning")
    paper.add_argument("--mode", choices=MODES, default="admm", help="the method or a baseline")
    paper.add_argument("--ticket", help="ticket.pt of a --mode admm run that pre-trained")
    paper.add_argument("--scheme", choices=("filter", "column", "irregular"), default="filter")
    paper.add_argument("--ratio", type=number(1, 10000), help="units, all / kept in each layer (default: 4)")
    paper.add_argument("--target-width", type=whole(1, 64), help="instead: the ratio is width / target width")
    paper.add_argument("--group-residual", action="store_true", help="one filter mask for a residual stream")
    paper.add_argument("--admm-epochs", type=whole(0, 10000), help="0 is the one-shot baseline")
    paper.add_argument("--admm-interval", type=whole(1, 10000), help="epochs per ADMM iteration (default: 1)")
    paper.add_argument("--admm-lr", type=rate, help="peak learning rate (default: half of --lr)")
    paper.add_argument("--admm-rise", type=number(0, 0.9), help="share of the ADMM steps in which the rate "
                       "rises; 0: it only falls, and U does not wind up (default: 0.2)")
    paper.add_argument("--finetune-lr", type=rate, help="of fine-tuning (default: --lr)")
    paper.add_argument("--rho", type=number(1e-9, 1000),
                       help="default: min(1, 3 (1 - momentum) / steps) / admm_lr, steps of an interval")
    paper.add_argument("--rho-growth", type=number(1, 100), help="factor at every update (default: 1)")
    paper.add_argument("--rho-max", type=number(1e-9, 1000), help="where the growth ends (default: 10)")
    args = resolve(parser, parser.parse_args(argv), longest_ramp=lambda args: phases_of(args)[
        "finetune" if args.mode == "ticket" else "pretrain"])
    if args.target_width and (args.ratio or args.target_width > args.width):
        parser.error(f"argument --target-width: not with --ratio, and from 1 to {args.width}, the width")
    if args.target_width:
        args.ratio = args.width / args.target_width
    args.ratio = args.ratio or 4.0
    if args.mode == "scratch" and (not args.target_width or args.scheme != "filter"):
        parser.error("argument --mode: scratch needs --target-width, and no --scheme")
    if args.mode in ("scratch", "ticket") and args.pretrained:
        parser.error(f"argument --pretrained: not with --mode {args.mode}, which trains from initial weights")
    if (args.mode == "ticket") != bool(args.ticket):
        parser.error("argument --ticket: a ticket.pt goes with --mode ticket, and with no other")
    if args.group_residual and (args.scheme != "filter" or args.mode in ("scratch", "ticket")):
        parser.error("argument --group-residual: is for pruning filters")
    phases = phases_of(args)
    if not phases["admm"]:
        parser.refuse(args, "without ADMM epochs", "rho", "rho_growth", "rho_max", "admm_lr", "admm_rise",
                      "admm_interval")
    if (args.rho_growth or 1) == 1:
        parser.refuse(args, "without --rho-growth", "rho_max")
    if args.mode in ("scratch", "ticket") or not phases["finetune"]:
        parser.refuse(args, f"in --mode {args.mode} with these epochs", "finetune_lr")
    args.admm_lr, args.finetune_lr = args.admm_lr or args.lr / 2, args.finetune_lr or args.lr
    args.rho_growth, args.rho_max = args.rho_growth or 1.0, args.rho_max or 10.0
    args.admm_interval = args.admm_interval or 1
    args.admm_rise = 0.2 if args.admm_rise is None else args.admm_rise
    if 0 < phases["admm"] < args.admm_interval:
        parser.error(f"argument --admm-interval: {args.admm_interval} is more than --admm-epochs")
    return args


def phases_of(args):
    """{phase: epochs} of the mode."""
    epochs = MODES[args.mode](args.pretrain_epochs, args.admm_epochs, args.finetune_epochs)
    return dict(zip(("pretrain", "admm", "finetune"), epochs))


# ---------------------------------------------------------------- the method

def first_rho(args, data):
    """[D] --rho, or a default by which W follows Z - U with a time constant, (1 - momentum) / (lr rho) steps,
    of a third of the updates' interval at the peak rate. UsageFault if --rho-growth begins at --rho-max."""
    steps = args.admm_interval * data.steps(args.batch_size)
    rho = args.rho or min(1, 3 * (1 - args.momentum) / steps) / args.admm_lr     # lr rho far above 1 diverges
    if args.rho_growth > 1 and rho >= args.rho_max:
        raise UsageFault(f"argument --rho-growth: rho begins at {rho:.3g}; --rho-max is {args.rho_max:g}")
    return rho


def prunable(model):
    """{name: layer} to be pruned: all convolutions and linear layers but the last, the classifier."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return dict(layers[:-1])


def importance(w, scheme):
    """[C] The norms, in float64, of the units of a weight (S, C, k, k) or (S, C): S filters, C k k columns or
    S C k k single weights."""
    check_finite("a weight", w)
    matrix = w.detach().double().flatten(1)                          # (S, C k k)
    if scheme == "irregular":
        return matrix.abs().flatten()
    return matrix.norm(dim={"filter": 1, "column": 0}[scheme])


def choose_masks(weights, scheme, ratio, tied=()):
    """[B] {name: boolean like w, True where it stays} for weights {name: (S, C, ...)}: exactly
    ceil(n / ratio) units a layer, the first among equals. Layers listed together in `tied` get one filter
    mask, by the root of the sum of their squared norms."""
    norms = {name: importance(w, scheme) for name, w in weights.items()}
    for names in tied:
        norms |= dict.fromkeys(names, torch.stack([norms[name] for name in names]).norm(dim=0))
    masks = {}
    for name, w in weights.items():
        mask = topk_mask(norms[name], ratio)
        shape = {"filter": (-1, 1), "column": (1, -1), "irregular": (len(w), -1)}[scheme]
        masks[name] = mask.view(shape).expand_as(w.flatten(1)).reshape(w.shape)
    return masks


def project(w, mask):
    """[C] A new tensor: w where the mask is True, else zero. Nearest to w of all with that many units, if the
    mask was chosen by w."""
    return torch.where(mask, w.detach(), 0)


class ADMM:
    """The penalty of [D] and the updates [E] and [F]; z, u, masks are {parameter: tensor like it}.
    choose({parameter: its values}) gives the masks [B]: of weights and, for filters, of all that [H] names.

    After each update rho grows by the factor `growth` up to rho_max, and u, which is the multiplier over rho,
    shrinks as much."""
    def __init__(self, model, choose, rho, growth=1.0, rho_max=10.0):
        self.choose, self.rho, self.growth, self.rho_max, self.residuals = choose, rho, growth, rho_max, []
        parameters = dict(model.named_parameters())
        self.masks = choose(parameters)
        self.weights = {name: parameters[name] for name in self.masks}
        self.z = {name: project(w, self.masks[name]) for name, w in self.weights.items()}
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}

    def penalty(self):
        """[D] rho/2 sum ||W - Z + U||^2, in float32."""
        return self.rho / 2 * sum((w - self.z[n] + self.u[n]).square().sum() for n, w in self.weights.items())

    @torch.no_grad()
    def update(self):
        """[E], [F], rho; returns the relative residual ||W - Z|| / ||W|| of all parameters together, and how
        many entries of the masks changed, in per cent, at most about 200 / ratio: a swap counts twice."""
        moved = {name: w + self.u[name] for name, w in self.weights.items()}
        before, self.masks = self.masks, self.choose(moved)
        factor = max(1.0, min(self.growth, self.rho_max / self.rho))
        gap = size = changed = 0
        for name, w in self.weights.items():
            self.z[name] = project(moved[name], self.masks[name])                    # [E]
            self.u[name] = (moved[name] - self.z[name]) / factor                     # [F]
            gap, size = gap + (w - self.z[name]).square().sum(), size + w.square().sum()
            changed += (self.masks[name] ^ before[name]).sum()
        self.rho *= factor
        self.residuals.append(math.sqrt(float(gap) / max(float(size), 1e-300)))
        return self.residuals[-1], 100 * float(changed) / sum(m.numel() for m in before.values())

    def state_dict(self):
        return dict(z=self.z, u=self.u, masks=self.masks, rho=self.rho, residuals=self.residuals)

    def load_state_dict(self, state):
        self.rho, self.residuals = state["rho"], state["residuals"]
        for name, w in self.weights.items():
            self.z[name], self.u[name] = state["z"][name].to(w.device), state["u"][name].to(w.device)
            self.masks[name] = state["masks"][name].to(w.device)


def build(artifact):
    """The network of a model.pt or dense.pt: with the layers' stored sizes; weights loaded strictly."""
    return resize_(build_network(**artifact["network"]), artifact["state"])


# ---------------------------------------------------------------- training

def train_epoch(model, batches, optimizer, schedule, args, penalty=None, masks=None, strength=1.0):
    """One epoch of adversarial training [A]; with a penalty, of ADMM's W-step [D]; with masks, of the pruned
    network [G]. The attack's radius and step are multiplied by `strength`. Returns what is logged: mean
    cross-entropy without the penalty, per cent right on the adversarial images of training."""
    total = right = n = 0
    for x, y in batches:
        with autocast(args):
            model.eval()                                         # the attack sees fixed batch-norm statistics
            x_adv = pgd(model, x, y, strength * args.epsilon, strength * args.step_size, args.num_steps)
            model.train()
            logits = model(x_adv)
        loss = F.cross_entropy(logits.float(), y)                    # [A] outer min; inner max: pgd
        total, right, n = total + loss.detach() * len(y), right + (logits.argmax(1) == y).sum(), n + len(y)
        if penalty:
            loss = loss + penalty()                                  # [D]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if masks:
            apply_masks_(model, masks)                               # [G]
    check_finite("the training loss", total)
    return dict(loss=total.item() / n, train_robust_acc=100 * right.item() / n)


def read_ticket(args, network):
    """The ticket.pt of a pruning run: initial weights and masks; UsageFault unless its flags agree."""
    if not Path(args.ticket).is_file() or not Path(args.ticket).with_name("dense.pt").is_file():
        raise UsageFault(f"argument --ticket: there is no file {args.ticket}, or no dense.pt beside it")
    ticket, made = read_artifact(args.ticket), dict(network=network, scheme=args.scheme, ratio=args.ratio)
    masks, state = ticket.get("masks"), ticket["state"]
    fits = masks and all(name in state and state[name].shape == m.shape for name, m in masks.items())
    if {k: ticket.get(k) for k in made} != made or not fits:
        raise UsageFault(f"argument --ticket: {args.ticket} is not a ticket of {made}")
    dense = read_artifact(Path(args.ticket).with_name("dense.pt"))
    if (dense["kind"], dense["network"]) != ("dense", network):
        raise UsageFault(f"argument --ticket: the dense.pt beside it is not a dense network of {network}")
    return ticket


def main(argv=None):
    args = get_args(argv)
    data = load_data(args)
    network, phases, ratio = network_of(args, data), phases_of(args), args.ratio
    if args.mode == "scratch":
        network["width"], ratio = args.target_width, 1
    model = build_network(**network)
    if args.pretrained:
        load_pretrained(model, args.pretrained, network)
    ticket = read_ticket(args, network) if args.ticket else None
    rho = first_rho(args, data)
    groups = removable_groups(model, network) if args.scheme == "filter" else ()
    tied = [list(writers) for writers, _, _ in groups] if args.group_residual else ()
    if args.group_residual and max(map(len, tied)) == 1:
        raise UsageFault(f"argument --group-residual: {args.arch} adds no filters' outputs to others'")
    run = Run(args, data, __file__, phases, argv)
    if run.result:
        return run.result
    has_ticket = args.mode == "admm" and not args.pretrained
    initial = run.compute_once("initial", lambda: dict(model.state_dict()) if has_ticket else {})
    model = prepare(model, args)
    layers = prunable(model)

    def choose(parameters):                                          # [B], [H]: {parameter: mask}
        weights = {name: parameters[f"{name}.weight"] for name in layers}
        masks = choose_masks(weights, args.scheme, ratio, tied)
        return parameter_masks(model, masks, filters=args.scheme == "filter")

    # Phase 1: a dense robust network.
    optimizer, schedule = make_optimizer(model, args.lr, phases["pretrain"], data, args)
    for epoch in run.epochs("pretrain", model=model, optimizer=optimizer, schedule=schedule):
        strength = ramp(epoch, args.ramp_epochs)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, strength=strength)
        run.log(epoch=epoch + 1, **fields, strength=strength)

    def save_dense():
        if ticket:
            shutil.copy(Path(args.ticket).with_name("dense.pt"), run.folder)
        else:
            save_model(run.folder / "dense.pt", run.script, "dense", network, model, args)
    run.compute_once("dense", save_dense)

    # Phase 2: ADMM pulls the dense weights towards sparse ones.
    admm = ADMM(model, choose, rho, args.rho_growth, args.rho_max)
    optimizer, schedule = make_optimizer(model, args.admm_lr, phases["admm"], data, args, rise=args.admm_rise)
    for epoch in run.epochs("admm", model=model, optimizer=optimizer, schedule=schedule, admm=admm):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, admm.penalty)
        if (epoch + 1) % args.admm_interval == 0:
            fields["rho"] = admm.rho
            fields["residual"], fields["mask_changed"] = admm.update()
        run.log(epoch=epoch + 1, **fields)
    if admm.residuals and admm.residuals[-1] > min(0.25, 1.1 * min(admm.residuals)):     # large, or rising
        run.log(note="ADMM did not converge (see the residual); more --admm-epochs or another --rho may help")
    residual = run.compute_once("residual", lambda: (admm.residuals or [None])[-1])

    # Phase 3: the cut, and fine-tuning of what is left.
    def choose_and_save_ticket():
        if ticket:
            return ticket["masks"]
        masks = {name: mask.cpu() for name, mask in choose(admm.weights).items()}
        if initial:
            save_model(run.folder / "ticket.pt", run.script, "ticket", network, model, args, initial,
                       masks=masks, scheme=args.scheme, ratio=args.ratio)
        return masks
    masks = {n: m.to(args.device) for n, m in run.compute_once("masks", choose_and_save_ticket).items()}
    if ticket:
        model.load_state_dict(ticket["state"])
    apply_masks_(model, masks)                                       # [G]
    # Counted by each layer's own mask: removing filters removes inputs of the next layers too.
    kept = {name: int(mask.sum()) for name, mask in masks.items() if name.endswith("weight")}
    if args.scheme == "filter":
        model, masks = remove_filters_(model, masks)
    model, masks = prepare(model, args), {name: mask for name, mask in masks.items() if not mask.all()}
    optimizer, schedule = make_optimizer(model, args.finetune_lr, phases["finetune"], data, args)
    for epoch in run.epochs("finetune", model=model, optimizer=optimizer, schedule=schedule):
        run.log(epoch=epoch + 1, **train_epoch(model, run.batches(), optimizer, schedule, args, masks=masks,
                                               strength=ramp(epoch, args.ramp_epochs) if ticket else 1.0))
    save_model(run.folder / "model.pt", run.script, "compact", network, model, args)
    return run.finish(kept=kept, rho=rho if phases["admm"] else None, residual=residual)


if __name__ == "__main__":
    cli(main)
