"""CSTAR: compact networks with a low-rank structure, trained against an adversary by ADMM.

Phan, Yin, Sui, Yuan, Zonouz: CSTAR: Towards Compact and Structured Deep Neural Networks with Adversarial
Robustness. AAAI 2023, arXiv 2212.01957.

The idea: every convolution is to be a Tucker-2 product of three thin ones; ADMM pulls the dense weights towards
tensors of that form while they are trained on adversarial images, so that the final cut costs little.

  [A]  min_W  E max_{|d| <= epsilon} loss(f_W(x + d), y)     s.t. every W_l is of Tucker-2 form, sizes within a budget
  [B]  W = G x_1 A x_2 B,  G (ro, ri, k, k), A (S, ro), B (C, ri);     parameters  C ri + k k ro ri + S ro
  [C]  E(ro, ri) = ||W||^2 - sum of squares of the leading ro x ri block of the full HOSVD core
  [D]  ranks of all layers together: least sum_l E_l / ||W_l||^2  with all parameters <= total / ratio
  [E]  W <- SGD on  loss(f_W(x_adv), y) + rho/2 sum_l ||W_l - Z_l + U_l||^2
  [F]  Z <- project(W + U)                                    truncated HOSVD, --hooi N sweeps on top
  [G]  U <- U + W - Z                                         scaled dual
  [H]  W <- project(W), factorised into 1x1 - kxk - 1x1; then fine-tuned like [A], the factors being free

S, C, k: output channels, input channels, kernel. A 1x1 kernel or a linear layer is a matrix: two factors, one rank.

What is whose. The paper's body was not available: from its abstract come [A], low rank in one framework with
robustness, ranks determined globally, and ratios 2 to 64. [B] and [E] to [H] are those of the Tucker-2 ADMM code of
the same group (Yin et al., CVPR 2021), with the adversarial loss put in. [C], [D], the rule for rho and every
epoch count are our reconstruction. The first convolution and the classifier stay dense; ratio counts all parameters.

  python cstar.py --dataset digits                     two minutes on two CPU cores, no network
  python cstar.py --arch resnet18 --ratio 16           CIFAR-10 at full width, for a GPU
The numbers these gave are in README.md. Of the paper's own, only differences are known (abstract): ResNet-18 on
CIFAR-10, up to 20.07 points of clean and 11.91 of robust accuracy over robust structured pruning.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Fault, Parser, Run, UsageFault, NETWORKS, autocast, build_network, cli, load_data, load_pretrained,
                    network_of, number, pgd, prepare, radius, resolve, save_model, sgd, whole)


def get_args(argv=None):
    parser = Parser(__doc__)
    run = parser.add_argument_group("run")
    run.add_argument("--dataset", default="cifar10", help="digits, mnist, cifar10, cifar100, svhn or a folder's name")
    run.add_argument("--data-dir", default="data", help="where data sets are looked for and downloaded to")
    run.add_argument("--workers", type=whole(1, 256), default=8, help="threads that decode class folders")
    run.add_argument("--train-images", type=whole(0), default=0, help="balanced subset to train on; 0 is all")
    run.add_argument("--eval-images", type=whole(0), help="the same of the test images (default: 1000 on a CPU)")
    run.add_argument("--arch", choices=NETWORKS)
    run.add_argument("--width", type=whole(1, 64), help="16 is the standard network")
    run.add_argument("--seed", type=whole(0), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    run.add_argument("--output", help="the run's folder (default: runs/ and a name made of the flags)")
    run.add_argument("--resume", action="store_true", help="continue the run in --output")
    run.add_argument("--pretrained", help="a dense.pt to start from; skips pre-training")
    train = parser.add_argument_group("training (defaults depend on the data set: RECIPES in common.py)")
    train.add_argument("--pretrain-epochs", type=whole(0, 10000))
    train.add_argument("--finetune-epochs", type=whole(0, 10000))
    train.add_argument("--batch-size", type=whole(2, 65536))
    train.add_argument("--lr", type=number(1e-8, 10), help="peak learning rate of pre-training")
    train.add_argument("--momentum", type=number(0, 0.999), default=0.9)
    train.add_argument("--weight-decay", type=number(0, 1), default=5e-4)
    train.add_argument("--amp", choices=("auto", "on", "off"), default="auto", help="bfloat16 in training")
    train.add_argument("--compile", action="store_true", help="torch.compile the network in training")
    attack = parser.add_argument_group("attack (l_inf; pixels are in [0, 1])")
    attack.add_argument("--epsilon", type=radius, help="radius, such as 8/255")
    attack.add_argument("--step-size", type=radius)
    attack.add_argument("--num-steps", type=whole(0, 10000), help="PGD steps in training")
    attack.add_argument("--eval-steps", type=whole(1, 10000), default=50, help="PGD steps in evaluation")
    attack.add_argument("--restarts", type=whole(1, 1000), default=2, help="random starts in evaluation")
    paper = parser.add_argument_group("CSTAR")
    paper.add_argument("--ratio", type=number(1, 10000), default=16, help="dense parameters / compact parameters")
    paper.add_argument("--rank-rule", choices=("hull", "uniform"), default="hull", help="[D], or one fraction for all layers")
    paper.add_argument("--admm-epochs", type=whole(0, 10000), help="0 is the one-shot baseline")
    paper.add_argument("--admm-lr", type=number(1e-8, 10), help="peak learning rate of ADMM (default: half of --lr)")
    paper.add_argument("--finetune-lr", type=number(1e-8, 10), help="of fine-tuning (default: half of --lr)")
    paper.add_argument("--rho", type=number(0, 1000), help="penalty (default: what fits learning rate and interval)")
    paper.add_argument("--hooi", type=whole(0, 100), default=0, help="alternating sweeps in every projection")
    args = resolve(parser, argv, Path(__file__).stem, compress="admm_epochs")
    args.admm_lr, args.finetune_lr = args.admm_lr or args.lr / 2, args.finetune_lr or args.lr / 2
    return args


# ---------------------------------------------------------------- the method: projection

def unfold(w, mode):
    """The mode-0 (S, C k k) or mode-1 (C, S k k) unfolding of a weight (S, C, k, k)."""
    return w.transpose(0, mode).flatten(1)


def leading(matrix, rank):
    """Orthonormal basis (rows, rank) of the leading left singular vectors, by eigh of the Gram matrix in float64."""
    matrix = matrix.double()
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def is_matrix(w):
    """Linear layers and 1x1 kernels have no core: they are a product of two matrices of one rank."""
    return w[0, 0].numel() == 1


def tucker2(w, rank, hooi=0):
    """[B] The factors of a weight (S, C, k, k) at rank (ro, ri): G (ro, ri, k, k), A (S, ro), B (C, ri), in float64.

    Truncated HOSVD, then `hooi` alternating sweeps. For a matrix (S, C) of rank (r,): A (S, r), B' (r, C)."""
    if not w.isfinite().all():
        raise Fault("a weight is not finite: training has diverged (try a lower --lr, or --amp off)")
    w = w.double()
    if is_matrix(w):
        a = leading(w.flatten(1), rank[0])
        return a, a.T @ w.flatten(1)
    a, b = leading(unfold(w, 0), rank[0]), leading(unfold(w, 1), rank[1])
    for _ in range(hooi):
        a = leading(unfold(torch.einsum("scxy,ci->sixy", w, b), 0), rank[0])
        b = leading(unfold(torch.einsum("scxy,so->ocxy", w, a), 1), rank[1])
    return torch.einsum("scxy,so,ci->oixy", w, a, b), a, b


def project(w, rank, hooi=0):
    """[F] The nearest weight of that rank that truncated HOSVD finds; rank None (the layer stays dense) is w itself."""
    if rank is None:
        return w.clone()
    if is_matrix(w):
        a, b = tucker2(w, rank)
        return (a @ b).view_as(w).to(w.dtype)
    g, a, b = tucker2(w, rank, hooi)
    return torch.einsum("oixy,so,ci->scxy", g, a, b).to(w.dtype)


# ---------------------------------------------------------------- the method: ranks

def factorisable(model):
    """{name: layer} that may be factorised: all convolutions and linear layers but the first and the classifier."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    names = [name for name, m in layers.items() if getattr(m, "groups", 1) == 1]
    return {name: layers[name] for name in names[1:-1]}


def cost(shape, rank):
    """[B] Parameters of a weight of that shape at that rank; None is dense."""
    s, c, k2 = shape[0], shape[1], math.prod(shape[2:])
    if rank is None:
        return s * c * k2
    return rank[0] * (s + c) if k2 == 1 else c * rank[1] + k2 * rank[0] * rank[1] + s * rank[0]


def error_table(w):
    """[C] Squared error of the projection at every rank pair: (S, C), entry [ro - 1, ri - 1]; for a matrix (min(S, C), 1)."""
    w = w.double()
    if is_matrix(w):
        energy = torch.linalg.svdvals(w.flatten(1)).square()[:, None]
    else:
        energy = tucker2(w, w.shape[:2])[0].square().sum((2, 3))
    return (energy.sum() - energy.cumsum(0).cumsum(1)).clamp_min(0)


def chain(w):
    """Nested states (cost, relative error, rank) of one layer, from rank 1 up to dense: each step adds one to one rank."""
    shape, table = w.shape, (error_table(w) / w.double().square().sum().clamp_min(1e-300)).tolist()
    rank, states = (len(table), len(table[0])), []
    while True:
        states.append((cost(shape, rank), table[rank[0] - 1][rank[1] - 1], rank))
        lower = [r for r in ((rank[0] - 1, rank[1]), (rank[0], rank[1] - 1)) if min(r) > 0]
        if not lower:
            break
        # Down: the one rank whose loss of energy per parameter saved is smaller.
        rank = min(lower, key=lambda r: (table[r[0] - 1][r[1] - 1] - states[-1][1]) / (states[-1][0] - cost(shape, r)))
    dense = (cost(shape, None), 0.0, None)
    return [s for s in reversed(states) if s[0] < dense[0]] + [dense]


def hull_segments(states):
    """The lower convex hull of a chain in the plane of cost and error, as (slope, states of the segment); slopes rise."""
    hull = []
    for i, (c, e, _) in enumerate(states):
        while len(hull) > 1:
            (c0, e0, _), (c1, e1, _) = states[hull[-2]], states[hull[-1]]
            if (e1 - e0) * (c - c0) < (e - e0) * (c1 - c0):
                break
            hull.pop()
        hull.append(i)
    return [((states[j][1] - states[i][1]) / (states[j][0] - states[i][0]), states[i + 1:j + 1])
            for i, j in zip(hull, hull[1:])]


def choose_ranks(weights, kept, ratio, rule="hull"):
    """[D] Ranks {name: (ro, ri), (r,) or None for dense} of weights {name: (S, C, ...)}, with kept other parameters.

    hull: every layer starts at rank 1; hull segments of all layers are taken by falling gain per parameter until one does
    not fit, and that one as far as it fits. A larger ratio is thus a shorter prefix of one list: ranks never grow with it.
    uniform: one fraction of the full ranks for all layers. Raises UsageFault if the ratio is out of reach."""
    total = kept + sum(w.numel() for w in weights.values())
    budget = math.floor(total / ratio) - kept
    least = sum(min(cost(w.shape, (1, 1)), w.numel()) for w in weights.values())
    if budget < least:
        raise UsageFault(f"argument --ratio: {ratio:g} is out of reach, this network goes from 1 to "
                         f"{math.floor(100 * total / (kept + least)) / 100}")
    if rule == "uniform":
        def at(fraction):
            ranks = {}
            for name, w in weights.items():
                full = [min(w.shape[:2])] if is_matrix(w) else w.shape[:2]
                rank = tuple(max(1, math.floor(fraction * n)) for n in full)
                ranks[name] = rank if cost(w.shape, rank) < w.numel() else None
            return ranks
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            fits = sum(cost(w.shape, at(middle)[n]) for n, w in weights.items()) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return at(high if high == 1 else low)
    chains = {name: chain(w) for name, w in weights.items()}
    state = {name: states[0] for name, states in chains.items()}
    spent = sum(s[0] for s in state.values())
    segments = sorted((slope, name, segment) for name, states in chains.items() for slope, segment in hull_segments(states))
    for _, name, segment in segments:
        for step in segment:
            if spent + step[0] - state[name][0] > budget:
                return {n: s[2] and s[2][:1 if is_matrix(weights[n]) else 2] for n, s in state.items()}
            spent, state[name] = spent + step[0] - state[name][0], step
    return {name: None for name in weights}


# ---------------------------------------------------------------- the method: ADMM and factors

class ADMM:
    """Z and U of every factorised layer, with the penalty of [E] and the updates [F] and [G]."""

    def __init__(self, layers, ranks, rho, hooi):
        self.weights = {name: layers[name].weight for name, rank in ranks.items() if rank}
        self.ranks, self.rho, self.hooi, self.residual = ranks, rho, hooi, []
        self.z = {name: project(w.detach(), ranks[name], hooi) for name, w in self.weights.items()}
        self.u = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def penalty(self):
        """[E] rho/2 sum ||W - Z + U||^2, a sum over layers, in float32."""
        return self.rho / 2 * sum((w - self.z[n] + self.u[n]).square().sum() for n, w in self.weights.items())

    @torch.no_grad()
    def update(self):
        """[F], [G]; returns the relative residual ||W - Z|| / ||W|| over all layers."""
        gap = size = 0.0
        for n, w in self.weights.items():
            self.z[n] = project(w + self.u[n], self.ranks[n], self.hooi)       # [F]
            self.u[n] = self.u[n] + w - self.z[n]                              # [G]
            gap, size = gap + (w - self.z[n]).square().sum(), size + w.square().sum()
        self.residual.append((gap / size).sqrt().item())
        return self.residual[-1]

    def state_dict(self):
        return dict(z=self.z, u=self.u, residual=self.residual)

    def load_state_dict(self, state):
        for mine, saved in ((self.z, state["z"]), (self.u, state["u"])):
            for name in mine:
                mine[name] = saved[name].view_as(mine[name]).to(mine[name])
        self.residual = list(state["residual"])


def factor_layer(layer, rank):
    """The thin layers that take a layer's place at that rank, their weights not yet set."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(layer.in_features, rank[0], bias=False), nn.Linear(rank[0], layer.out_features, bias))
    where = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    last = nn.Conv2d(rank[0], layer.out_channels, 1, bias=bias)
    if is_matrix(layer.weight):
        return nn.Sequential(nn.Conv2d(layer.in_channels, rank[0], **where, bias=False), last)
    return nn.Sequential(nn.Conv2d(layer.in_channels, rank[1], 1, bias=False),
                         nn.Conv2d(rank[1], rank[0], **where, bias=False), last)


@torch.no_grad()
def factorise(model, ranks, hooi=0):
    """[H] Replaces, in place, every layer with a rank by its factors: 1x1 - kxk - 1x1, or two for a matrix."""
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer = model.get_submodule(name)
        thin, w = factor_layer(layer, rank).to(layer.weight), layer.weight
        if is_matrix(w):
            a, b = tucker2(w, rank)
            factors = b, a
        else:
            g, a, b = tucker2(w, rank, hooi)
            factors = b.T, g, a
        for part, factor in zip(thin, factors):
            part.weight.copy_(factor.reshape(part.weight.shape))
        if layer.bias is not None:
            thin[-1].bias.copy_(layer.bias)
        model.set_submodule(name, thin)
    return model


def build(artifact):
    """The network of a model.pt: the plain architecture with thin layers where a rank is stored, weights loaded strictly."""
    model = build_network(**artifact["network"])
    for name, rank in artifact["ranks"].items():
        if rank is not None:
            model.set_submodule(name, factor_layer(model.get_submodule(name), rank))
    model.load_state_dict(artifact["state"])
    return model


@torch.no_grad()
def reestimate_batchnorm(model, batches, most=200):
    """Running statistics as plain averages over at most `most` batches: the cut has moved every activation."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    model.train()
    for _, (x, _) in zip(range(most), batches):
        model(x)
    for m, momentum in zip(norms, before):
        m.momentum = momentum


# ---------------------------------------------------------------- training

def train_epoch(model, batches, optimizer, schedule, args, penalty=None):
    """One epoch of adversarial training [A]; with a penalty, of ADMM's W-step [E]. Returns what is logged."""
    total = correct = count = 0
    for x, y in batches:
        with autocast(args):
            model.eval()                                                     # the attack sees fixed batch-norm statistics
            x_adv = pgd(model, x, y, args.epsilon, args.step_size, args.num_steps)   # [A] inner max
            model.train()
            logits = model(x_adv)
        loss = F.cross_entropy(logits.float(), y)                            # [A] outer min
        total, correct, count = total + loss.detach() * len(y), correct + (logits.argmax(1) == y).sum(), count + len(y)
        if penalty:
            loss = loss + penalty()                                          # [E]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(total):
        raise Fault("the training loss is not finite: training has diverged (try a lower --lr, or --amp off)")
    return dict(loss=total.item() / count, train_robust_acc=100 * correct.item() / count)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = get_args(argv)
    data = load_data(args)
    network = network_of(args, data)
    model = build_network(**network)
    layers = factorisable(model)
    if args.pretrained:
        load_pretrained(model, args.pretrained, network)
    kept = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in layers.values())
    choose_ranks({n: m.weight.detach() for n, m in layers.items()}, kept, args.ratio, "uniform")    # refuses a ratio out of reach
    run = Run(args, data, Path(__file__).stem, argv)
    if run.result:
        return run.result
    if not args.pretrained:
        model = build_network(**network)                                     # again, now that the seed is set
    prepare(model, args)

    # Phase 1: dense and robust.
    optimizer, schedule = sgd(model, args.lr, args.pretrain_epochs, data, args)
    for epoch in run.epochs("pretrain", args.pretrain_epochs, model=model, optimizer=optimizer, schedule=schedule):
        run.log(epoch=epoch + 1, **train_epoch(model, run.batches(), optimizer, schedule, args))

    def dense():
        save_model(run.folder / "dense.pt", "common", network, model, args)
        weights = {n: m.weight.detach().cpu() for n, m in layers.items()}
        return choose_ranks(weights, kept, args.ratio, args.rank_rule)
    layers = factorisable(model)
    ranks = run.once("ranks", dense)

    # Phase 2: ADMM pulls the dense weights towards the chosen ranks.
    rho = args.rho
    if rho is None:
        # W follows Z - U with time constant (1 - momentum) / (lr rho) steps: it should be the interval of updates.
        rho = (1 - args.momentum) / (args.admm_lr * data.steps(args.batch_size))
    admm = ADMM(layers, ranks, rho, args.hooi)
    optimizer, schedule = sgd(model, args.admm_lr, args.admm_epochs, data, args)
    for epoch in run.epochs("admm", args.admm_epochs, model=model, optimizer=optimizer, schedule=schedule, admm=admm):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, admm.penalty)
        run.log(epoch=epoch + 1, **fields, residual=admm.update(), rho=rho)

    # Phase 3: the cut, and fine-tuning of the factors.
    again = run.skips("finetune")
    model = prepare(factorise(model, ranks, args.hooi), args)                # [H]
    if not again:
        reestimate_batchnorm(model, data.batches(args.batch_size, run.generator))
    optimizer, schedule = sgd(model, args.finetune_lr, args.finetune_epochs, data, args)
    for epoch in run.epochs("finetune", args.finetune_epochs, model=model, optimizer=optimizer, schedule=schedule):
        run.log(epoch=epoch + 1, **train_epoch(model, run.batches(), optimizer, schedule, args))

    save_model(run.folder / "model.pt", run.script, network, model, args, ranks=ranks)
    return run.finish(ranks=ranks)


if __name__ == "__main__":
    cli(main)
