"""CSTAR: compact networks with a low-rank structure, trained against an adversary by ADMM.

Phan, Yin, Sui, Yuan, Zonouz: CSTAR: Towards Compact and Structured Deep Neural Networks with Adversarial
Robustness. AAAI 2023, arXiv 2212.01957.

The idea: each layer but the first and the last is to be a product of thin ones (Tucker-2); ADMM pulls dense
weights towards that form while they train on adversarial images, so that the final cut costs little.

  [A]  min_W  E max_{|d| <= epsilon} loss(f_W(x + d), y)    s.t. W_l of Tucker-2 form, sizes within a budget
  [B]  W = G x_1 A x_2 B,  G (ro, ri, k, k), A (S, ro), B (C, ri);     parameters  C ri + k k ro ri + S ro
  [C]  E(ro, ri) = ||W||^2 - sum of squares of the leading ro x ri block of the full HOSVD core
  [D]  ranks of all layers, chosen once, from the trained W: sum_l E_l / ||W_l||^2 small (greedy on convex
       hulls, inexact), all parameters <= total / ratio; 3 % of every full rank first; a layer may stay dense
  [E]  W <- SGD on  loss(f_W(x_adv), y) + rho/2 sum_l ||W_l - Z_l + U_l||^2
  [F]  Z <- project(W + U)          after every epoch: truncated HOSVD, --hooi N sweeps on top
  [G]  U <- U + W - Z               then: scaled dual; at first U = 0, Z = project(W)
  [H]  W <- project(W), factorised into 1x1 - kxk - 1x1; batch norm's statistics are estimated anew, on
       attacked images (the attack sees those of clean ones); then fine-tuned like [A], the factors being free
S, C, k: output and input channels, kernel. A 1x1 kernel or linear layer is a matrix: two factors, one rank.

Sources
* The paper, of which only abstracts and an extract were available: global ranks (in arXiv's abstract, not in
  AAAI's), Tucker-2 projection (its Algorithm 1, for its Eqn. 12, which we take for [F]), ratios 2 to 64,
  8/255 in steps of 2/255.
* Its group's ADMM code, not CSTAR's own (Yin et al., CVPR 2021; miaoyin390/DNN-Compression-Tensor-ADMM): [B],
  [E] to [H], and which layers stay dense; that CSTAR uses ADMM is inferred. What differs there: clean images;
  ranks from tables made by hand; updates before an epoch, the first too; up to 100 HOOI sweeps; rho 1e-3;
  weight decay 1e-4; dense 1x1 shortcuts; three factors of a linear layer; fine-tuning at 1/20 of the rate
  (ImageNet: 1/10); no new statistics in [H].
* Ours: [A] as written, [C], [D], those statistics, PGD's steps, rates, epochs, Nesterov, --budget macs.

  python cstar.py --dataset digits                     one or two minutes of a CPU core, offline
  python cstar.py --arch resnet18 --ratio 16           CIFAR-10 at full width, for a GPU (not run there)
The second with --num-steps 1 --step-size 10/255 --batch-size 128 and 10 + 3 + 5 epochs took 153 minutes and
5.6 GB on two CPU cores: clean / robust % dense (44.7 MB) 76.0 / 38.3, compact (2.8 MB) 74.9 / 37.5
(results/README.md). By its abstract CSTAR leads robust structured pruning, ResNet-18, by up to +20.07 /
+11.91 (CIFAR-10, ratio not given) and by +8.58 / +4.27 (ImageNet, ratio 16).
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Run, UsageFault, autocast, build_network, by_rank_0, check_finite, cli, count_macs,
                    evaluating, load_data, load_pretrained, make_optimizer, network_of, number, pgd, prepare,
                    ramp, rate, reestimate_batchnorm_, resolve, save_model, script_parser, whole)

FLOOR = 0.03                                                     # [D]: the share of a full rank given first


def get_args(argv=None):
    parser = script_parser(__doc__, __file__, "admm_epochs")
    paper = parser.add_argument_group("CSTAR (letters: see the head of the file)")
    paper.add_argument("--ratio", type=number(1, 10000), default=16.0,
                       help="dense / compact, in --budget (default: 16)")
    paper.add_argument("--rank-rule", choices=("hull", "uniform"), default="hull", help="[D] or one fraction")
    paper.add_argument("--budget", choices=("parameters", "macs"), default="parameters", help="in [D]")
    paper.add_argument("--admm-epochs", type=whole(0, 10000), help="0 is the one-shot baseline")
    paper.add_argument("--admm-lr", type=rate, help="first learning rate of ADMM (default: --lr)")
    paper.add_argument("--finetune-lr", type=rate, help="peak rate of fine-tuning (default: --lr)")
    paper.add_argument("--rho", type=number(1e-9, 1000),
                       help="default: min(1, 3 (1 - momentum) / steps) / admm_lr, steps of an epoch")
    paper.add_argument("--hooi", type=whole(0, 100), default=0, help="alternating sweeps in every projection")
    args = resolve(parser, parser.parse_args(argv))
    if not args.admm_epochs:
        parser.refuse(args, "without --admm-epochs", "rho", "admm_lr")
    if not args.finetune_epochs:
        parser.refuse(args, "without epochs of fine-tuning", "finetune_lr")
    args.admm_lr, args.finetune_lr = args.admm_lr or args.lr, args.finetune_lr or args.lr
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
    (S, C) at rank (r,): A (S, r), B (C, r). Truncated HOSVD in float64, then `hooi` alternating sweeps.
    In einsum: s, c, o, i are S, C, ro, ri; xy is the kernel."""
    check_finite("a weight", w)
    w = w.double()
    if is_matrix(w):
        a = leading(w.flatten(1), rank[0])
        return a, w.flatten(1).T @ a
    a, b = leading(unfold(w, 0), rank[0]), leading(unfold(w, 1), rank[1])
    for _ in range(hooi):
        a = leading(unfold(torch.einsum("scxy,ci->sixy", w, b), 0), rank[0])
        b = leading(unfold(torch.einsum("scxy,so->ocxy", w, a), 1), rank[1])
    return torch.einsum("scxy,so,ci->oixy", w, a, b), a, b


def project(w, rank, hooi=0):
    """[F] w cut to that rank by tucker2(), with at most twice the least possible squared error."""
    *core, a, b = tucker2(w, rank, hooi)
    product = torch.einsum("oixy,so,ci->scxy", *core, a, b) if core else a @ b.T
    return product.view_as(w).to(w.dtype)


def factorisable(model):
    """{name: layer} to be factorised: of linear layers and convolutions without groups all but two, the first
    and the last."""
    layers = [(name, m) for name, m in model.named_modules()
              if type(m) in (nn.Conv2d, nn.Linear) and getattr(m, "groups", 1) == 1]     # attention's differ
    return dict(layers[1:-1])


def cost(shape, rank, place=(1, 1)):
    """[B] Parameters of a weight of that shape at that rank, None being dense; or, given place = (pixels
    of the layer's input, of its output), its multiply-accumulates per image."""
    (s, c, *kernel), (inputs, outputs) = shape, place
    k2 = math.prod(kernel)
    if rank is None:
        return s * c * k2 * outputs
    if k2 == 1:
        return rank[0] * (s + c) * outputs
    return c * rank[1] * inputs + (k2 * rank[0] * rank[1] + s * rank[0]) * outputs


def positions(model, network):
    """{name: (pixels of its input, of its output)} of all convolutions and linear layers."""
    places = {}
    def note(layer, inputs, output):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            places[layer] = inputs[0].numel() // layer.weight.shape[1], output.numel() // len(layer.weight)
    with evaluating(model), nn.modules.module.register_module_forward_hook(note):
        model(torch.zeros(1, network["channels"], *network["size"]))
    return {name: places[m] for name, m in model.named_modules() if m in places}


def budget_of(model, ratio, places=None, macs=0):
    """[D] floor(total / ratio) less the cost of what is not factorised; UsageFault if even ranks 1 cost more.
    Costs are parameters or, given positions() and count_macs(), multiply-accumulates."""
    total, layers = macs or sum(p.numel() for p in model.parameters()), factorisable(model)
    if not layers:
        raise UsageFault("argument --arch: nothing can be factorised between its first layer and its last")
    costs = [[cost(m.weight.shape, rank, places[name] if places else (1, 1)) for rank in (None, (1, 1))]
             for name, m in layers.items()]                          # (dense, at ranks 1)
    fixed = total - sum(dense for dense, _ in costs)
    least = fixed + sum(map(min, costs))
    if total // ratio < least:
        most = total / least - 0.005                             # so that .2f rounds down
        raise UsageFault(f"argument --ratio: {ratio:g} is not from 1 to {most:.2f}, what this network allows")
    return int(total // ratio) - fixed


def full_rank(w):
    """The rank at which the projection loses nothing: (S, C), of a matrix (min(S, C),)."""
    return (min(w.shape[:2]),) if is_matrix(w) else tuple(w.shape[:2])


def error_table(w):
    """[C] Squared errors of the projection at all ranks: (S, C), entry [ro - 1, ri - 1]; of a matrix
    (min(S, C),)."""
    *core, _, b = tucker2(w, full_rank(w))       # of a matrix, b's columns are as long as its singular values
    energy = core[0].square().sum((2, 3)) if core else b.square().sum(0)
    kept = energy
    for mode in range(energy.dim()):
        kept = kept.cumsum(mode)
    return (energy.sum() - kept).clamp_min(0)


def chain(w, least, place=(1, 1)):
    """[D] A layer's choices (cost, relative error, rank), cheapest first, from the ranks `least` to dense.
    Found from full rank down: of ro and ri that one falls by 1 which adds less error for the cost saved."""
    table = (error_table(w) / w.double().square().sum().clamp_min(1e-300)).numpy()
    error = lambda rank: float(table[tuple(r - 1 for r in rank)])
    rank, dense = full_rank(w), cost(w.shape, None, place)
    states = [(dense, 0.0, None)]
    while rank:
        size = cost(w.shape, rank, place)
        if size < dense:
            states.append((size, error(rank), rank))
        def loss_per_cost(below):
            return (error(below) - error(rank)) / (size - cost(w.shape, below, place))
        smaller = [(*rank[:mode], r - 1, *rank[mode + 1:]) for mode, r in enumerate(rank) if r > least[mode]]
        rank = min(smaller, key=loss_per_cost, default=None)
    return states[::-1]


def hull_segments(states):
    """Lower convex hull of a chain, [(slope, states)]: slopes rise, so sorting by them keeps its order."""
    hull = []
    for i, (c, e, _) in enumerate(states):
        while len(hull) > 1:
            (c0, e0, _), (c1, e1, _) = states[hull[-2]], states[hull[-1]]
            if (e1 - e0) * (c - c0) < (e - e0) * (c1 - c0):
                break
            hull.pop()
        hull.append(i)
    slope = lambda i, j: (states[j][1] - states[i][1]) / (states[j][0] - states[i][0])
    return [(slope(i, j), states[i + 1:j + 1]) for i, j in zip(hull, hull[1:])]


def rank_path(weights, places, floor):
    """[D] Yields (name, its new rank or None), step by step from ranks 1 everywhere to dense: first all ranks
    rise together to the fraction `floor` of full ones, then hull segments follow, the steepest first."""
    full = {name: full_rank(w) for name, w in weights.items()}
    least = {name: [math.ceil(floor * n) for n in rank] for name, rank in full.items()}
    ranks = {name: [1] * len(rank) for name, rank in full.items()}
    rises, segments = [], []
    for name, rank in full.items():
        for mode, n in enumerate(rank):
            rises += [(r / n, name, mode, r) for r in range(2, least[name][mode] + 1)]
    for _, name, mode, r in sorted(rises):
        ranks[name][mode] = r
        yield name, tuple(ranks[name])
    for name, w in weights.items():
        segments += [(slope, name, s) for slope, s in hull_segments(chain(w, least[name], places[name]))]
    for _, name, segment in sorted(segments):
        yield from ((name, rank) for _, _, rank in segment)


def choose_ranks(weights, budget, rule="hull", places=None):
    """[D] Ranks (ro, ri), (r,) or None (dense) for weights {name: (S, C, ...)}: rank_path() as far as the
    budget goes, so that a larger ratio never gives a larger rank. "uniform": all rise together to the end."""
    places = places or dict.fromkeys(weights, (1, 1))
    def state(name, rank):
        """(cost, rank), dense where that costs no more."""
        size, dense = (cost(weights[name].shape, r, places[name]) for r in (rank, None))
        return (size, rank) if size < dense else (dense, None)
    states = {name: state(name, (1,) * len(full_rank(w))) for name, w in weights.items()}
    spare = budget - sum(size for size, _ in states.values())
    for name, rank in rank_path(weights, places, {"uniform": 1.0, "hull": FLOOR}[rule]):
        step = state(name, rank)
        spare -= step[0] - states[name][0]
        if spare < 0:
            break
        states[name] = step
    return {name: rank for name, (_, rank) in states.items()}


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
    where = {key: getattr(layer, key) for key in
             ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
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
        # Eigenvectors may differ in sign between processes: those of rank 0 are taken.
        *core, a, b = by_rank_0(lambda: [f.cpu() for f in tucker2(w, rank, hooi)])
        for part, factor in zip(thin, (b.T, *core, a)):
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


# ---------------------------------------------------------------- training

def train_epoch(model, batches, optimizer, schedule, args, penalty=None, strength=1.0):
    """One epoch of adversarial training [A]; with a penalty, of ADMM's W-step [E]; radius and step times
    `strength`. Returns what is logged: mean cross-entropy alone, per cent right on adversarial images."""
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
    check_finite("the training loss", total)
    return dict(loss=total.item() / n, train_robust_acc=100 * right.item() / n)


def main(argv=None):
    args = get_args(argv)
    data = load_data(args)
    network = network_of(args, data)
    model = build_network(**network)
    by_macs = args.budget == "macs"
    places, macs = (positions(model, network), count_macs(model, network)) if by_macs else (None, 0)
    budget = budget_of(model, args.ratio, places, macs)
    if args.pretrained:
        load_pretrained(model, args.pretrained, network)
    phases = dict(pretrain=args.pretrain_epochs, admm=args.admm_epochs, finetune=args.finetune_epochs)
    run = Run(args, data, __file__, phases, argv)
    if run.result:
        return run.result
    model = prepare(model, args)

    # Phase 1: a dense robust network.
    optimizer, schedule = make_optimizer(model, args.lr, args.pretrain_epochs, data, args)
    for epoch in run.epochs("pretrain", model=model, optimizer=optimizer, schedule=schedule):
        strength = ramp(epoch, args.ramp_epochs)
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, strength=strength)
        run.log(epoch=epoch + 1, **fields, strength=strength)
    layers = factorisable(model)
    def save_dense_and_choose_ranks():
        save_model(run.folder / "dense.pt", run.script, "dense", network, model, args)
        weights = {name: m.weight.detach().cpu() for name, m in layers.items()}
        return choose_ranks(weights, budget, args.rank_rule, places)
    ranks = run.compute_once("ranks", save_dense_and_choose_ranks)                   # [D]

    # Phase 2: ADMM pulls the dense weights towards those ranks. [E] moves W to Z - U with a time constant of
    # (1 - momentum) / (lr rho) steps, at first a third of an epoch. The rate only falls: else U grows first.
    rho = args.rho or min(1, 3 * (1 - args.momentum) / data.steps(args.batch_size)) / args.admm_lr
    admm = ADMM(layers, ranks, rho, args.hooi)
    optimizer, schedule = make_optimizer(model, args.admm_lr, args.admm_epochs, data, args, rise=0.0)
    for epoch in run.epochs("admm", model=model, optimizer=optimizer, schedule=schedule, admm=admm):
        fields = train_epoch(model, run.batches(), optimizer, schedule, args, admm.penalty)
        run.log(epoch=epoch + 1, **fields, rho=rho, residual=admm.update())
    if admm.residuals and admm.residuals[-1] > min(0.25, 1.1 * min(admm.residuals)):     # large, or rising
        run.log(note="ADMM did not converge (see the residual); more --admm-epochs or another --rho may help")

    residual = run.compute_once("residual", lambda: (admm.residuals or [None])[-1])

    # Phase 3: the cut, and fine-tuning of the factors.
    model = prepare(factorise_(model, ranks, args.hooi), args)       # [H]
    if not run.saved:                                                # else last.pt has the statistics
        count = min(200, data.steps(args.batch_size))
        reestimate_batchnorm_(model, data.batches(args.batch_size, run.generator), count)
        # PGD needs fixed statistics, and the model's change here: so a copy with the clean ones is attacked.
        source = prepare(copy.deepcopy(model.cpu()), args).eval()
        model.to(args.device)
        reestimate_batchnorm_(model, ((pgd(source, x, y, args.epsilon, args.step_size, args.num_steps), y)
                                      for x, y in data.batches(args.batch_size, run.generator)), count)
    optimizer, schedule = make_optimizer(model, args.finetune_lr, args.finetune_epochs, data, args)
    for epoch in run.epochs("finetune", model=model, optimizer=optimizer, schedule=schedule):
        run.log(epoch=epoch + 1, **train_epoch(model, run.batches(), optimizer, schedule, args))
    save_model(run.folder / "model.pt", run.script, "compact", network, model, args, ranks=ranks)
    return run.finish(ranks=ranks, rho=rho if args.admm_epochs else None, residual=residual)


if __name__ == "__main__":
    cli(main)
