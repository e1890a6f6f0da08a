"""CSTAR: compact networks with a low-rank structure, trained against an adversary by ADMM.

Phan, Yin, Sui, Yuan, Zonouz: CSTAR: Towards Compact and Structured Deep Neural Networks with Adversarial
Robustness. AAAI 2023, arXiv 2212.01957.

The idea: every convolution is to be a Tucker-2 product of three thin ones; ADMM pulls the dense weights
towards tensors of that form while they train on adversarial images, so that the final cut costs little.

  [A]  min_W  E max_{|d| <= epsilon} loss(f_W(x + d), y)    s.t. W_l of Tucker-2 form, sizes within a budget
  [B]  W = G x_1 A x_2 B,  G (ro, ri, k, k), A (S, ro), B (C, ri);     parameters  C ri + k k ro ri + S ro
  [C]  E(ro, ri) = ||W||^2 - sum of squares of the leading ro x ri block of the full HOSVD core
  [D]  ranks of all layers: small sum_l E_l / ||W_l||^2, all parameters <= total / ratio (greedy, not exact)
  [E]  W <- SGD on  loss(f_W(x_adv), y) + rho/2 sum_l ||W_l - Z_l + U_l||^2
  [F]  Z <- project(W + U)                                    truncated HOSVD, --hooi N sweeps on top
  [G]  U <- U + W - Z                                         scaled dual
  [H]  W <- project(W), factorised into 1x1 - kxk - 1x1; then fine-tuned like [A], the factors being free
S, C, k: output and input channels, kernel. A 1x1 kernel or linear layer is a matrix: two factors, one rank.

Sources. The paper's body was not available: from its abstract come [A], low rank in one framework
with robustness, ranks determined globally, and ratios 2 to 64. [B] and [E] to [H] are those of the same
group's Tucker-2 ADMM code (Yin et al., CVPR 2021), with the adversarial loss put in. [C], [D], the rule for
rho and every epoch count are our reconstruction. The first convolution and the classifier stay dense.

  python cstar.py --dataset digits                     two minutes on two CPU cores, no network
  python cstar.py --arch resnet18 --ratio 16           CIFAR-10 at full width, for a GPU
What they printed is in results/README.md. Of the paper's own, only differences are known (abstract): up to
20.07 points of clean and 11.91 of robust accuracy over robust structured pruning, ResNet-18 on CIFAR-10.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Fault, Run, UsageFault, autocast, build_network, cli, load_data, load_pretrained,
                    network_of, number, pgd, prepare, ramp, rate, resolve, save_model, script_parser,
                    sgd, whole)


def get_args(argv=None):
    parser = script_parser(__doc__, __file__, "admm_epochs")
    paper = parser.add_argument_group("CSTAR")
    paper.add_argument("--ratio", type=number(1, 10000), default=16.0, help="all parameters, dense / compact")
    paper.add_argument("--rank-rule", choices=("hull", "uniform"), default="hull", help="[D] or one fraction")
    paper.add_argument("--admm-epochs", type=whole(0, 10000), help="0 is the one-shot baseline")
    paper.add_argument("--admm-lr", type=rate, help="peak learning rate (default: half of --lr)")
    paper.add_argument("--finetune-lr", type=rate, help="of fine-tuning (default: --lr)")
    paper.add_argument("--rho", type=number(1e-9, 1000), help="penalty (default: fits rate and interval)")
    paper.add_argument("--hooi", type=whole(0, 100), default=0, help="alternating sweeps in every projection")
    args = resolve(parser, parser.parse_args(argv))
    if not args.admm_epochs:
        parser.refuse(args, "without --admm-epochs", "rho", "admm_lr")
    args.admm_lr, args.finetune_lr = args.admm_lr or args.lr / 2, args.finetune_lr or args.lr
    return args


# ---------------------------------------------------------------- the method

def unfold(w, mode):
    """The mode-0 (S, C k k) or mode-1 (C, S k k) unfolding of a weight (S, C, k, k)."""
    return w.transpose(0, mode).flatten(1)


def leading(matrix, rank):
    """The leading left singular vectors (rows, rank), orthonormal, by eigh of the Gram matrix in float64."""
    matrix = matrix.double()
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def is_matrix(w):
    """Linear layers and 1x1 kernels have no core: they are a product of two matrices of one rank."""
    return w[0, 0].numel() == 1


def tucker2(w, rank, hooi=0):
    """[B] Factors of a weight (S, C, k, k) at rank (ro, ri): G (ro, ri, k, k), A (S, ro), B (C, ri); matrices
    (S, C) at rank (r,): A (S, r), B' (r, C). Truncated HOSVD in float64, then `hooi` alternating sweeps."""
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
    """[F] The nearest weight of that rank that truncated HOSVD finds; at rank None (stays dense) w itself."""
    if rank is None:
        return w.clone()
    if is_matrix(w):
        a, b = tucker2(w, rank)
        return (a @ b).view_as(w).to(w.dtype)
    g, a, b = tucker2(w, rank, hooi)
    return torch.einsum("oixy,so,ci->scxy", g, a, b).to(w.dtype)


def factorisable(model):
    """{name: layer} to be factorised: all convolutions and linear layers but the first and the classifier."""
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
    """[C] Squared errors (S, C) of the projection, entry [ro - 1, ri - 1]; for a matrix (min(S, C), 1)."""
    w = w.double()
    if is_matrix(w):
        energy = torch.linalg.svdvals(w.flatten(1)).square()[:, None]
    else:
        energy = tucker2(w, w.shape[:2])[0].square().sum((2, 3))
    return (energy.sum() - energy.cumsum(0).cumsum(1)).clamp_min(0)


def chain(w):
    """Nested states (cost, relative error, rank) of a layer, from rank 1 to dense. Built from full rank down:
    the rank that goes down by one is the one that loses less energy for a parameter saved."""
    table = (error_table(w) / w.double().square().sum().clamp_min(1e-300)).tolist()
    pair, states = (len(table), len(table[0])), []
    while min(pair) > 0:
        size, error = cost(w.shape, pair), table[pair[0] - 1][pair[1] - 1]
        states.append((size, error, pair[:1] if is_matrix(w) else pair))
        def loss_per_parameter(below):
            return (table[below[0] - 1][below[1] - 1] - error) / (size - cost(w.shape, below))
        smaller = [p for p in ((pair[0] - 1, pair[1]), (pair[0], pair[1] - 1)) if min(p) > 0]
        pair = min(smaller, key=loss_per_parameter, default=(0, 0))
    return [s for s in reversed(states) if s[0] < w.numel()] + [(w.numel(), 0.0, None)]


def hull_segments(states):
    """Lower convex hull of a chain: (change of relative error per parameter, states of the segment)."""
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


def parameter_budget(model, ratio):
    """[D] floor(total / ratio) less the parameters that are kept; UsageFault if even ranks 1 need more."""
    total = sum(p.numel() for p in model.parameters())
    shapes = [m.weight.shape for m in factorisable(model).values()]
    kept = total - sum(shape.numel() for shape in shapes)
    least = kept + sum(min(cost(shape, (1, 1)), shape.numel()) for shape in shapes)
    if total // ratio < least:
        most = total / least - 0.005
        raise UsageFault(f"argument --ratio: {ratio:g} is not from 1 to {most:.2f}, what this network allows")
    return int(total // ratio) - kept


def choose_ranks(weights, budget, rule="hull"):
    """[D] Ranks (ro, ri), (r,) or None (dense) for weights {name: (S, C, ...)}, within `budget` parameters.

    hull: from ranks 1, hull segments of all layers in order of gain per parameter until a step does not fit;
    a larger ratio ends the list earlier: no rank grows with it. uniform: one fraction of all full ranks."""
    if rule == "uniform":
        def at(fraction):
            ranks = {}
            for name, w in weights.items():
                full = [min(w.shape[:2])] if is_matrix(w) else w.shape[:2]
                rank = tuple(max(1, int(fraction * n)) for n in full)
                ranks[name] = rank if cost(w.shape, rank) < w.numel() else None
            return ranks
        def fits(fraction):
            return sum(cost(weights[name].shape, rank) for name, rank in at(fraction).items()) <= budget
        low, high = 0.0, 1.0                                         # ranks 1 fit: parameter_budget saw to it
        for _ in range(0 if fits(high) else 20):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return at(high if fits(high) else low)

    chains = {name: chain(w) for name, w in weights.items()}
    state = {name: states[0] for name, states in chains.items()}
    spare = budget - sum(s[0] for s in state.values())
    for _, name, segment in sorted((slope, name, segment) for name, states in chains.items()
                                   for slope, segment in hull_segments(states)):
        for step in segment:
            spare -= step[0] - state[name][0]
            if spare < 0:
                return {n: s[2] for n, s in state.items()}
            state[name] = step
    return {n: s[2] for n, s in state.items()}


class ADMM:
    """The penalty of [E] and the updates [F] and [G]; z and u are {name: tensor like that layer's weight}."""
    def __init__(self, layers, ranks, rho, hooi=0):
        self.weights = {name: layers[name].weight for name, rank in ranks.items() if rank}
        self.ranks, self.rho, self.hooi, self.residuals = ranks, rho, hooi, []
        self.z = {name: project(w.detach(), ranks[name], hooi) for name, w in self.weights.items()}
        self.u = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def penalty(self):
        """[E] rho/2 sum ||W - Z + U||^2 over the layers, in float32."""
        return self.rho / 2 * sum((w - self.z[n] + self.u[n]).square().sum() for n, w in self.weights.items())

    @torch.no_grad()
    def update(self):
        """[F], [G]; returns the relative residual ||W - Z|| / ||W|| of all layers together."""
        gap = size = 0
        for name, w in self.weights.items():
            self.z[name] = project(w + self.u[name], self.ranks[name], self.hooi)    # [F]
            self.u[name] = self.u[name] + w - self.z[name]                           # [G]
            gap, size = gap + (w - self.z[name]).square().sum(), size + w.square().sum()
        self.residuals.append(math.sqrt(float(gap) / max(float(size), 1e-300)))
        return self.residuals[-1]

    def state_dict(self):
        return dict(z=self.z, u=self.u, residuals=self.residuals)

    def load_state_dict(self, state):
        self.residuals = state["residuals"]
        for name, w in self.weights.items():
            self.z[name], self.u[name] = state["z"][name].to(w.device), state["u"][name].to(w.device)


def factor_layer(layer, rank):
    """The thin layers that take a layer's place at that rank, their weights not yet set."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(layer.in_features, rank[0], bias=False),
                             nn.Linear(rank[0], layer.out_features, bias))
    where = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding,
                 dilation=layer.dilation)
    last = nn.Conv2d(rank[0], layer.out_channels, 1, bias=bias)
    if is_matrix(layer.weight):
        return nn.Sequential(nn.Conv2d(layer.in_channels, rank[0], **where, bias=False), last)
    return nn.Sequential(nn.Conv2d(layer.in_channels, rank[1], 1, bias=False),
                         nn.Conv2d(rank[1], rank[0], **where, bias=False), last)


@torch.no_grad()
def factorise_(model, ranks, hooi=0):
    """[H] Replaces every layer that has a rank by its factors: 1x1 - kxk - 1x1, two for a matrix."""
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
    """The network of a model.pt or dense.pt: thin layers where a rank is stored; weights loaded strictly."""
    model = build_network(**artifact["network"])
    for name, rank in artifact.get("ranks", {}).items():
        if rank is not None:
            model.set_submodule(name, factor_layer(model.get_submodule(name), rank))
    model.load_state_dict(artifact["state"])
    return model


@torch.no_grad()
def reestimate_batchnorm_(model, batches, most=200):
    """Running statistics become plain averages over at most `most` batches of clean images, because the cut
    moved every activation; fine-tuning moves them on to adversarial images, which they see only then."""
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

def train_epoch(model, batches, optimizer, schedule, args, penalty=None, strength=1.0):
    """One epoch of adversarial training [A]; with a penalty, of ADMM's W-step [E]. The attack's radius and
    step are multiplied by `strength`. Returns what is logged: mean cross-entropy without the penalty, per
    cent right on the adversarial images of training."""
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
            loss = loss + penalty()                                  # [E]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(total):
        raise Fault("the training loss is not finite: training has diverged (try a lower --lr, or --amp off)")
    return dict(loss=total.item() / n, train_robust_acc=100 * right.item() / n)


def main(argv=None):
    args = get_args(argv)
    data = load_data(args)
    network = network_of(args, data)
    model = build_network(**network)
    budget = parameter_budget(model, args.ratio)
    if args.pretrained:
        load_pretrained(model, args.pretrained, network)
    phases = dict(pretrain=args.pretrain_epochs, admm=args.admm_epochs, finetune=args.finetune_epochs)
    run = Run(args, data, __file__, phases, argv)
    if run.result:
        return run.result
    model = prepare(model, args)

    # Phase 1: a dense robust network.
    optimizer, schedule = sgd(model, args.lr, args.pretrain_epochs, data, args)
    for epoch in run.epochs("pretrain", model=model, optimizer=optimizer, schedule=schedule):
        strength = ramp(epoch, args.ramp_epochs)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, strength=strength)
        run.log(epoch=epoch + 1, **fields, strength=strength)
    layers = factorisable(model)

    def save_dense_and_choose_ranks():
        save_model(run.folder / "dense.pt", run.script, "dense", network, model, args)
        return choose_ranks({n: m.weight.detach().cpu() for n, m in layers.items()}, budget, args.rank_rule)
    ranks = run.compute_once("ranks", save_dense_and_choose_ranks)   # [D]

    # Phase 2: ADMM pulls the dense weights towards those ranks. W follows Z - U with time constant
    # (1 - momentum) / (lr rho) steps; at the peak rate three of them fit an epoch, the interval of updates.
    rho = args.rho or 3 * (1 - args.momentum) / (args.admm_lr * data.steps(args.batch_size))
    admm = ADMM(layers, ranks, rho, args.hooi)
    optimizer, schedule = sgd(model, args.admm_lr, args.admm_epochs, data, args)
    for epoch in run.epochs("admm", model=model, optimizer=optimizer, schedule=schedule, admm=admm):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, admm.penalty)
        run.log(epoch=epoch + 1, **fields, rho=rho, residual=admm.update())
    if admm.residuals and admm.residuals[-1] > 1.1 * min(admm.residuals):
        run.log(note="the residual grew: ADMM did not converge; more --admm-epochs or another --rho may help")

    # Phase 3: the cut, and fine-tuning of the factors.
    model = prepare(factorise_(model, ranks, args.hooi), args)       # [H]
    if not run.saved:                                                # else last.pt holds them
        reestimate_batchnorm_(model, data.batches(args.batch_size, run.generator))
    optimizer, schedule = sgd(model, args.finetune_lr, args.finetune_epochs, data, args)
    for epoch in run.epochs("finetune", model=model, optimizer=optimizer, schedule=schedule):
        run.log(epoch=epoch + 1, **train_epoch(model, run.batches(), optimizer, schedule, args))
    save_model(run.folder / "model.pt", run.script, "compact", network, model, args, ranks=ranks)
    return run.finish(ranks=ranks, rho=rho if args.admm_epochs else None)


if __name__ == "__main__":
    cli(main)
