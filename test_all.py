"""Correctness on tiny networks: oracles, properties, runs end to end. CPU only, no network.

Tests against independent libraries (foolbox, pyautoattack, scikit-learn, scipy, tensorly, torchao) are skipped
where those are not installed. Break the code once and watch the test of that line fail.
"""
import ast
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import admm_prune
import binary_relax
import common
import cstar
import hydra_prune
from tools import bench, compare
from tools import evaluate as judges

HERE = Path(__file__).parent
SCRIPTS = [cstar, admm_prune, hydra_prune, binary_relax]
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
SHIPPED = HERE / "results" / "digits-cstar-s0"
TINY = ("--dataset digits --arch resnet18 --width 1 --train-images 128 --eval-images 40 --batch-size 32 "
        "--pretrain-epochs 2 --admm-epochs 2 --finetune-epochs 2 --num-steps 2 --eval-steps 3 --restarts 1 "
        "--ratio 4 --device cpu").split()
torch.set_num_threads(1)


def tiny(folder, *more, script=cstar):
    flags = " ".join(TINY)
    if script is hydra_prune:
        flags = flags.replace("--admm-epochs", "--prune-epochs")
    if script is binary_relax:
        flags = flags.replace("resnet18", "enresnet --depth 8 --noise 0").replace("--ratio 4", "--bits 2")
        flags = flags.replace("--admm-epochs", "--relax-epochs")
    return script.main([*flags.split(), "--output", str(folder), *more])


def unevaluated(monkeypatch):
    """From here on runs end with their model.pt and give what is only the script's: evaluation takes long."""
    monkeypatch.setattr(common.Run, "finish", lambda run, *judge, **more: more)


def weights_of(path):
    return common.load_model(path).state_dict()


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def conv_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resnet(width=1, channels=1, classes=10, size=8):
    torch.manual_seed(0)
    return common.build_network("resnet18", width, channels, classes, (size, size))


@pytest.fixture(scope="session")
def digits():
    args = cstar.get_args(["--dataset", "digits", "--device", "cpu"])
    return common.load_data(args)


def trained(epsilon):
    args = cstar.get_args("--dataset digits --arch lenet --width 8 --pretrain-epochs 15 --batch-size 32 "
                          f"--lr 0.05 --device cpu --amp off --epsilon {epsilon}".split())
    args.num_steps, args.step_size = 4 if epsilon else 0, epsilon / 2
    data = common.load_data(args)
    model = common.build_network(**common.network_of(args, data))
    optimizer, schedule = common.make_optimizer(model, args.lr, args.pretrain_epochs, data, args)
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.pretrain_epochs):
        cstar.train_epoch(model, data.batches(args.batch_size, generator), optimizer, schedule, args)
    return model.eval()


@pytest.fixture(scope="session")
def robust():
    return trained(0.2)


@pytest.fixture(scope="session")
def standard():
    return trained(0.0)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(script, *flags): folder and result of a run that was not interrupted, made once."""
    @functools.cache
    def run(script, *more):
        folder = tmp_path_factory.mktemp("run") / "whole"
        return folder, tiny(folder, *more, script=script)
    return run


@pytest.fixture(scope="session")
def finished(whole):
    return whole(cstar)


# ---------------------------------------------------------------- data
def test_digits_are_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(HERE / "data" / "digits.npz") as stored:
        assert (stored["images"] == theirs.images).all() and (stored["labels"] == theirs.target).all()


def test_data_subsets_are_balanced_and_prefixes_of_each_other(digits):
    labels = digits.train[1].numpy()
    small, large = common.balanced(labels, 50), common.balanced(labels, 200)
    assert (np.bincount(labels[small]) == 5).all() and (np.bincount(labels[large]) == 20).all()
    assert set(small) <= set(large) and len(set(large)) == 200


def test_data_crop_and_flip_move_whole_images():
    x = torch.arange(2 * 1 * 4 * 5, dtype=torch.uint8).view(2, 1, 4, 5)
    seen, padded = set(), F.pad(x[1, 0], (1,) * 4)
    for seed in range(200):
        out = common.augment(x, 1, True, torch.Generator().manual_seed(seed))[1, 0]
        matches = [(dy, dx, flip) for dy, dx, flip in itertools.product(range(3), range(3), (False, True))
                   if torch.equal(out, (lambda w: w.flip(1) if flip else w)(padded[dy:dy + 4, dx:dx + 5]))]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 18                                                   # every offset, mirrored and not


def test_data_epoch_is_a_shuffle_without_repetition(digits):
    x = [x for x, _ in digits.batches(100, torch.Generator().manual_seed(1))]
    flat = torch.cat(x).flatten(1)
    assert len(x) == 14 and all(b.shape == (100, 1, 8, 8) for b in x) and 0 <= flat.min() and flat.max() == 1
    whole = digits.train[0].float().div(255).flatten(1)
    assert len(flat.unique(dim=0)) >= 1400 - (len(whole) - len(whole.unique(dim=0)))


def write_images(root, mode="RGB", size=(8, 8), count=6):
    from PIL import Image
    rng = np.random.default_rng(0)
    for split, label in itertools.product(("train", "test"), ("ant", "bee")):
        folder = root / split / label
        folder.mkdir(parents=True)
        for i in range(count):
            shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_data_class_folders_equal_their_pixels_whatever_lies_beside_them(tmp_path, mode, channels, monkeypatch):
    from PIL import Image
    write_images(tmp_path / "zoo", mode, size=(9, 8))
    args = cstar.get_args(["--dataset", "zoo", "--data-dir", str(tmp_path), "--epsilon", "8/255",
                           "--device", "cpu"])
    assert args.step_size == args.epsilon / 4
    first = common.load_data(args)
    assert first.classes == ["ant", "bee"] and first.train[0].shape == (12, channels, 8, 9)
    pixels = np.asarray(Image.open(tmp_path / "zoo/train/bee/2.png")).reshape(8, 9, channels)
    assert (first.train[0][8].permute(1, 2, 0).numpy() == pixels).all() and first.train[1][8] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo"] and first.test[1].tolist() == [0, 1] * 6
    for clutter in (".DS_Store", "train/Thumbs.db", "train/ant/Thumbs.db", "test/bee/.hidden"):
        (tmp_path / "zoo" / clutter).write_text("clutter")
    for folder in (".ipynb_checkpoints", "train/.ipynb_checkpoints", "train/ant/.ipynb_checkpoints"):
        (tmp_path / "zoo" / folder).mkdir()
    if mode == "RGB":                                            # one grey image, the first, changes nothing
        Image.fromarray(pixels[..., 0]).save(tmp_path / "zoo/train/ant/0.png")
    again = common.load_data(args)
    assert torch.equal(first.train[0][1:], again.train[0][1:]) and torch.equal(first.test[1], again.test[1])
    if mode == "RGB":
        assert (again.train[0][0] == torch.from_numpy(pixels[..., 0].copy())).all()
    args.dataset, raw = "mnist", tmp_path / "MNIST/raw"          # what a failed download leaves hides nothing
    (tmp_path / "zoo").rename(tmp_path / "mnist")
    raw.mkdir(parents=True)
    for split, kind in [("", ""), *itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1"))]:
        if split:
            (raw / f"{split}-{kind}-ubyte").write_bytes(b"half")
        assert torch.equal(common.load_data(args).train[0], again.train[0])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(common.Fault, match="pip install pillow"):
        common.load_data(args)


# ---------------------------------------------------------------- networks
@pytest.mark.parametrize("arch, channels, size, counts", [               # papers' tables: width -> parameters
    ("lenet", 1, 28, {1: 13514, 2: 52506, 4: 206954, 8: 821706, 16: 3274634}),
    ("lenet", 3, 32, {1: 62006, 2: 244962, 4: 973754, 8: 3882858, 16: 15507146}),
    ("vgg16", 3, 32, {1: 58686, 2: 232274, 4: 924186, 8: 3686954, 16: 14728266}),
    ("resnet18", 3, 32, {1: 44622, 2: 176402, 4: 701466, 8: 2797610, 16: 11173962}),
    ("wrn28_4", 3, 32, {16: 5849050})])
def test_networks_have_the_papers_parameter_counts(arch, channels, size, counts):
    with torch.device("meta"):
        for width, count in counts.items():
            model = common.build_network(arch, width, channels, 10, (size, size))
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("arch, channels, size", [
    ("lenet", 1, (8, 12)), ("lenet", 2, (20, 16)), ("vgg16", 1, (32, 40)), ("resnet18", 2, (9, 8)),
    ("wrn28_4", 4, (5, 4))])
def test_networks_take_any_channels_and_sizes_that_fit(arch, channels, size):
    model = common.build_network(arch, 1, channels, 7, size)
    assert model(torch.rand(2, channels, *size)).shape == (2, 7)
    with pytest.raises(common.UsageFault, match="too deep"):
        common.build_network(arch, 1, channels, 7, (3, 3))


def test_resnet18_has_the_common_layer_names_and_macs_that_equal_the_sum_by_hand():
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight",
            "layer4.1.bn2.bias", "linear.bias"} <= resnet().state_dict().keys()
    w, total = [64, 64, 128, 256, 512], 32 * 32 * 27 * 64 + 512 * 10
    for i in range(4):
        side = 32 // 2**i
        total += side * side * (9 * w[i] * w[i + 1] + 3 * 9 * w[i + 1] ** 2 + (w[i] * w[i + 1] if i else 0))
    network = dict(arch="resnet18", width=16, channels=3, classes=10, size=[32, 32])
    assert common.count_macs(common.build_network(**network), network) == total


# ---------------------------------------------------------------- the attack
def linear(weight, bias=0.0):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), torch.full((weight.shape[0],), bias)
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_pgd_reaches_the_closed_form_optimum_of_a_linear_network():
    w = conv_weight(2, 12).float()
    x, y = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    direction = (w[1] - w[0]).sign().view(1, 3, 2, 2) * (1 - 2 * y.float()).view(-1, 1, 1, 1)
    best = (x + 0.1 * direction).clamp(0, 1)
    for settings in (dict(step_size=0.1, num_steps=1, random_start=False), dict(step_size=0.03, num_steps=10),
                     dict(step_size=0.03, num_steps=10, loss="margin")):
        assert torch.allclose(common.pgd(linear(w), x, y, 0.1, **settings), best, atol=1e-6)


def test_pgd_equals_foolbox_without_random_start(robust, digits):
    foolbox = pytest.importorskip("foolbox")
    x, y = common.to_float(digits.test[0][:100]), digits.test[1][:100]
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=20, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(robust, bounds=(0, 1), device="cpu"), x, y, epsilons=0.2)
    ours = common.pgd(robust, x, y, 0.2, 0.03, 20, random_start=False)
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_pgd_leaves_weights_gradients_modes_and_statistics_alone(training):
    model = resnet().train(training)
    model.bn1.eval()
    model.linear.bias.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = copy.deepcopy(model.state_dict())
    modes, wants = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    x_adv = common.pgd(model, x, y, 0.2, 0.05, 4)
    assert not x_adv.requires_grad and (x_adv - x).abs().max() <= 0.2 + 1e-6
    assert 0 <= x_adv.min() and x_adv.max() <= 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in list(model.parameters())[1:]) and (model.conv1.weight.grad == 1).all()


def test_pgd_with_epsilon_zero_is_the_image_and_losses_are_those_asked_for():
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([1, 2, 3])
    assert torch.equal(common.pgd(resnet().eval(), x, y, 0.0, 0.1, 3), x)
    seen = []
    common.pgd(resnet().eval(), x, y, 0.1, 0.1, 3, eot=2,
               loss=lambda logits, labels: seen.append(1) or logits[:, 0])
    assert len(seen) == 6
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, 0.0, -1.0]])
    assert torch.equal(common.margin_loss(logits, torch.tensor([2, 0])), torch.tensor([1.5, -3.0]))


class Waits(TorchDispatchMode):
    """Counts what a GPU would stop for: reading a value, and shapes that depend on values."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.name() == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += masks or func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **kwargs or {})


@every_script
def test_training_attacks_in_eval_mode_and_waits_for_a_gpu_only_in_pgds_two_checks(script):
    args = script.get_args("--dataset digits --num-steps 3 --device cpu --amp off".split())
    x, y, modes, waits = torch.rand(8, 1, 8, 8), torch.arange(8), [], []
    for batches in (1, 3):
        model = resnet()
        scores = hydra_prune.Scores(model, "irregular", 5)
        weights = [p for p in model.parameters() if p.dim() > 1]
        masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters()}
        more = {cstar: dict(penalty=lambda: sum(w.square().sum() for w in weights)), admm_prune: dict(masks=masks),
                hydra_prune: dict(scores=scores), binary_relax: dict(weights=weights, lam=2.0)}[script]
        optimizer = torch.optim.SGD((scores if script is hydra_prune else model).parameters(), 0.01)
        model.register_forward_pre_hook(lambda m, _: modes.append(m.training))
        with Waits() as found:
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
            script.train_epoch(model, [(x, y)] * batches, optimizer, schedule, args, **more)
        waits.append(found.count)
    assert modes == ([False] * 3 + [True] * (2 if script is binary_relax else 1)) * 4
    assert waits[1] - waits[0] == 2 * 2                          # are the pixels and is the gradient fit?


# ---------------------------------------------------------------- evaluation
SETTINGS = dict(epsilon=0.2, step_size=0.05, num_steps=20)


def test_autoattack_gets_gradients_that_it_can_view_flat(monkeypatch):
    """It calls grad.view(N, -1), which fails on a gradient of several channels that is channels last."""
    pyautoattack = pytest.importorskip("pyautoattack")

    def attack(self, x, y, batch_size):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(self.model(leaf).sum(), leaf)[0].view(len(x), -1)
        seen.append(x.shape)
        assert self.apgd_targeted.n_target_classes == self.fab.n_target_classes == 4
        return x, y
    seen, model = [], resnet(channels=3, classes=5).eval().to(memory_format=torch.channels_last)
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", attack)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    y = model(common.to_float(images)).argmax(1)
    assert judges.autoattack(model, (images, y), epsilon=0.1) == (100.0, "standard")
    assert seen == [images.shape]
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(common.Fault, match="four classes"):
        judges.autoattack(resnet(channels=3, classes=3), (images, y), epsilon=0.1)


def test_evaluate_is_near_autoattack(digits):
    pyautoattack = pytest.importorskip("pyautoattack")
    model = common.load_model(SHIPPED / "model.pt")
    images = [t[:50] for t in digits.test]
    ours = common.evaluate(model, images, epsilon=0.2, step_size=0.05, num_steps=50)["robust_acc"] / 2

    def survivors(images, attack):
        judge = pyautoattack.AutoAttack(model, eps=0.2, version="custom", attacks=[attack], seed=0)
        judge.apgd_targeted.n_target_classes = 3
        x_adv = judge.run_standard_evaluation(common.to_float(images[0]), images[1], batch_size=100)[0]
        right = model(x_adv).argmax(1) == images[1]
        return [t[right] for t in images]
    ce = survivors(images, "apgd-ce")
    left = len(survivors(ce, "apgd-t")[1])                       # of 50: two restarts are the weaker attack
    assert 25 < left <= ours and abs(ours - len(ce[1])) <= 5 and ours - left <= 7, (ours, len(ce[1]), left)


def test_evaluate_counts_every_iterate_of_every_restart(robust, digits):
    images = [t[:60] for t in digits.test]
    x, y, generator = common.to_float(images[0]), images[1], torch.Generator().manual_seed(0)
    survived = robust(x).argmax(1) == y
    for margin in (False, True, False):                          # the same attack, written plainly
        x_adv = (x + 0.2 * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
        for _ in range(21):
            x_adv.requires_grad_()
            logits = robust(x_adv)
            survived &= logits.argmax(1) == y
            loss = common.margin_loss(logits, y).sum() if margin else F.cross_entropy(logits, y)
            gradient, = torch.autograd.grad(loss, x_adv)
            x_adv = torch.clamp(x_adv.detach() + 0.05 * gradient.sign(), x - 0.2, x + 0.2).clamp(0, 1)
    found = common.evaluate(robust, images, **SETTINGS, restarts=3, losses=["ce", "margin"])
    assert found["robust_acc"] == common.per_cent(survived)


def test_evaluate_falls_with_steps_and_restarts_for_every_image(robust, digits):
    with common.evaluating(robust):
        def broken(steps, restarts):
            first = common.first_broken_iterate(robust, digits.test, torch.Generator().manual_seed(0), epsilon=0.15,
                                       step_size=0.02, num_steps=steps, restarts=restarts)
            return first <= steps
        few, more_steps, more_restarts = broken(5, 1), broken(12, 1), broken(5, 4)
        assert (few <= more_steps).all() and (few <= more_restarts).all()
        assert (more_steps <= broken(12, 4)).all()
        assert few.sum() < more_steps.sum() and few.sum() <= more_restarts.sum()


def test_evaluate_interval_is_wilsons():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for k, n in ((0, 40), (13, 40), (40, 40), (733, 1000)):
        expected = binomtest(k, n).proportion_ci(method="wilson")
        theirs = [100 * expected.low, 100 * expected.high]
        assert common.interval(100 * k / n, n) == pytest.approx(theirs, abs=0.006)


class Wrapped(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model, x)


def test_sanity_flags_are_silent_on_honest_networks_and_not_on_a_weak_attack(robust, standard, digits):
    for model, least in ((robust, 40), (standard, 0)):
        assert common.sanity_flags(model, digits.test, **SETTINGS) == []
        assert common.evaluate(model, digits.test, **SETTINGS)["robust_acc"] >= least
    flags = common.sanity_flags(robust, digits.test, epsilon=0.2, step_size=0.01, num_steps=4)
    assert any("not converged" in flag for flag in flags) and any("FGSM" in flag for flag in flags)


def neighbours(model, x):
    return model(x) + 0.01 * x.mean() * torch.arange(10)


@pytest.mark.parametrize("expected, change", [
    ("zero gradients", lambda model, x: 1e4 * model(x)),
    ("zero gradients", lambda model, x: model((x * 4).round() / 4)),
    ("random output", lambda model, x: model(x + 0.15 * torch.randn_like(x))),
    ("batch-dependent", neighbours),
    ("probabilities", lambda model, x: model(x).softmax(1))])
def test_sanity_flags_catch_masked_networks(standard, digits, expected, change):
    flags = common.sanity_flags(Wrapped(standard, change), digits.test, **SETTINGS)
    assert any(expected in flag for flag in flags), flags
    if expected == "zero gradients":                             # masking: what PGD misses others find
        assert any("stronger" in flag or "epsilon 1" in flag for flag in flags), flags


def test_evaluate_of_a_random_network_is_repeatable_and_says_so(robust, digits):
    model = Wrapped(robust, lambda inner, x: inner(x + 0.1 * torch.randn_like(x)))
    images = [t[:40] for t in digits.test]
    state = torch.get_rng_state()
    first, second = (common.evaluate(model, images, **SETTINGS, eot=2, seed=3) for _ in range(2))
    assert first == second and first["attack"]["draws"] == 10 and torch.equal(state, torch.get_rng_state())
    still = SETTINGS | dict(epsilon=0, num_steps=1)              # no attack: the least of two sets of draws
    still = [common.evaluate(model, images, **still, eot=1, seed=seed) for seed in range(6)]
    gaps = [result["clean_acc"] - result["robust_acc"] for result in still]
    assert min(gaps) >= 0 and sum(gap > 0 for gap in gaps) >= 4
    others = [common.evaluate(model, images, **SETTINGS, eot=2, seed=seed) for seed in (4, 5, 6)]
    assert any(other["robust_acc"] != first["robust_acc"] for other in others)


def test_evaluate_takes_bytes_as_labels_and_refuses_what_is_no_image_or_label(robust, digits):
    x, y = images = [t[:60] for t in digits.test]
    model = copy.deepcopy(robust).train()
    as_bytes = common.evaluate(model, (x, y.to(torch.uint8)), **SETTINGS)
    assert as_bytes == common.evaluate(robust, images, **SETTINGS) and as_bytes["robust_acc"] < 100
    for wrong in ((common.to_float(x), y), (x[0], y), (x, y + 1), (x, y - 1), (x, y[1:]), (x, y.float())):
        for judge in (common.evaluate, common.sanity_flags):
            with pytest.raises(common.Fault, match="uint8|10 classes"):
                judge(model, wrong, **SETTINGS)
    for pixel in (math.nan, -0.01, 255.0):
        x_wrong = common.to_float(x)
        x_wrong[3, 0, 2, 2] = pixel
        with pytest.raises(common.Fault, match="^a pixel is not in"):
            common.pgd(model, x_wrong, y, 0.2, 0.05, 3)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_numbers_never_become_an_accuracy(value, robust, digits):
    broken = Wrapped(robust, lambda model, x: model(x) * torch.where(torch.arange(10) == 3, value, 1.0))
    with pytest.raises(common.Fault, match="not finite"):
        common.evaluate(broken, digits.test, **SETTINGS)
    with pytest.raises(common.Fault, match="not finite"):
        common.pgd(broken, torch.rand(4, 1, 8, 8), torch.arange(4), 0.2, 0.05, 3)


def test_transfer_is_weaker_than_white_box(robust, standard, digits):
    white = common.evaluate(robust, digits.test, **SETTINGS)["robust_acc"]
    assert judges.transfer(robust, standard, digits.test, **SETTINGS) > white
    own = judges.transfer(robust, robust, digits.test, **SETTINGS)
    assert own == pytest.approx(white, abs=2)


# ---------------------------------------------------------------- CSTAR: projection
SHAPES = [((6, 5, 3, 3), (2, 3)), ((4, 7, 3, 3), (3, 2)), ((5, 6, 1, 1), (2,)), ((8, 5), (3,))]


@pytest.mark.parametrize("shape, rank", SHAPES)
def test_cstar_projection_has_the_rank_is_idempotent_and_pythagorean(shape, rank):
    for hooi in (0, 3):
        w = conv_weight(*shape)
        p = cstar.project(w, rank, hooi)
        ranks = [torch.linalg.matrix_rank(cstar.unfold(p, mode)).item() for mode in (0, 1)]
        assert ranks == list(rank if len(rank) == 2 else rank * 2)
        assert (cstar.project(p, rank, hooi) - p).abs().max() < 1e-9
        assert w.square().sum() == pytest.approx((p.square().sum() + (w - p).square().sum()).item(), rel=1e-9)
        full = shape[:2] if len(rank) == 2 else (min(shape[:2]),)
        assert torch.allclose(cstar.project(w, full, hooi), w)
    assert torch.equal(w, conv_weight(*shape))                               # the input is as it was


def alternating(w, ro, ri, seed, sweeps=60):
    """Tucker-2 by alternating least squares from a random start, in numpy: an oracle that shares no code."""
    w, rng = w.numpy(), np.random.default_rng(seed)
    b = np.linalg.qr(rng.standard_normal((w.shape[1], ri)))[0]
    for _ in range(sweeps):
        other = np.einsum("scxy,ci->sixy", w, b).reshape(w.shape[0], -1)
        a = np.linalg.svd(other, full_matrices=False)[0][:, :ro]
        half = np.einsum("scxy,so->ocxy", w, a).transpose(1, 0, 2, 3).reshape(w.shape[1], -1)
        b = np.linalg.svd(half, full_matrices=False)[0][:, :ri]
    return (w**2).sum() - (np.einsum("scxy,so,ci->oixy", w, a, b) ** 2).sum()


@pytest.mark.parametrize("shape, rank", SHAPES[:2])
def test_cstar_projection_is_near_the_best_of_fifty_alternating_runs(shape, rank):
    w = conv_weight(*shape)
    best = min(alternating(w, *rank, seed) for seed in range(50))
    error = [(w - cstar.project(w, rank, hooi)).square().sum().item() for hooi in (0, 30)]
    assert best - 1e-9 <= error[1] <= error[0] <= 2 * best and error[1] <= 1.05 * best


@pytest.mark.parametrize("shape, rank", SHAPES[:2])
def test_cstar_projection_with_sweeps_is_within_one_per_cent_of_tensorly(shape, rank):
    pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot
    w = conv_weight(*shape)
    (core, factors), _ = partial_tucker(w.numpy(), rank=list(rank), modes=[0, 1], init="svd")
    theirs = np.square(w.numpy() - multi_mode_dot(core, factors, modes=[0, 1])).sum()
    assert (w - cstar.project(w, rank, 50)).square().sum().item() <= 1.01 * theirs


@pytest.mark.parametrize("shape, rank", SHAPES)
def test_cstar_error_table_equals_direct_computation(shape, rank):
    w = conv_weight(*shape)
    table = cstar.error_table(w)
    for pair in np.ndindex(*table.shape):
        rank = tuple(i + 1 for i in pair[:len(rank)])
        error = (w - cstar.project(w, rank)).square().sum().item()
        assert table[pair].item() == pytest.approx(error, abs=1e-9)


# ---------------------------------------------------------------- CSTAR: ranks
def spent(weights, ranks):
    return sum(cstar.cost(w.shape, ranks[name]) for name, w in weights.items())


def relative_error(weights, ranks):
    return sum(((w - cstar.project(w, ranks[n])).square().sum() / w.square().sum()).item()
               for n, w in weights.items())


def decaying(*shape, seed):
    """A weight whose singular values fall, as those of a trained network do."""
    w = conv_weight(*shape, seed=seed)
    return w * torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1)) ** -1.0


def test_cstar_ranks_are_near_an_exhaustive_search():
    weights = {"a": decaying(4, 3, 3, 3, seed=1), "b": decaying(5, 4, 3, 3, seed=2),
               "c": decaying(6, 5, seed=3)}
    options = []
    for w in weights.values():
        pairs = itertools.product(*(range(1, n + 1) for n in w.shape[:2]))
        ranks = [(r,) for r in range(1, 6)] if w.ndim == 2 else list(pairs)
        options.append([(cstar.cost(w.shape, r), relative_error({0: w}, {0: r})) for r in ranks])
        options[-1].append((w.numel(), 0.0))
    picks = [(sum(c for c, _ in pick), sum(e for _, e in pick)) for pick in itertools.product(*options)]
    total = sum(w.numel() for w in weights.values())
    largest_step = max(c for option in options for c, _ in option) / 4
    least = sum(option[0][0] for option in options)
    for budget in range(math.ceil(least + largest_step), total, total // 12):
        best = min(e for c, e in picks if c <= budget)
        ranks = cstar.choose_ranks(weights, budget)
        uniform = cstar.choose_ranks(weights, budget, "uniform")
        assert spent(weights, ranks) <= budget and spent(weights, uniform) <= budget
        # What nesting may cost: the step that does not fit is left out, though a smaller one elsewhere would.
        slack = min(e for c, e in picks if c <= budget - largest_step)
        assert best - 1e-9 <= relative_error(weights, ranks) <= 1.05 * slack + 1e-9
        assert relative_error(weights, uniform) >= best - 1e-9


@pytest.fixture(scope="module")
def resnet18_weights():
    torch.manual_seed(0)
    model = common.build_network("resnet18", 16, 3, 10, (32, 32))
    weights = {n: m.weight.detach() for n, m in cstar.factorisable(model).items()}
    for w in weights.values():                                   # power-law spectra in both modes
        s, c = (torch.arange(1, n + 1) for n in w.shape[:2])
        w *= s.view(-1, 1, 1, 1) ** -0.7 * c.view(-1, 1, 1) ** -0.4
    return model, weights


@pytest.mark.parametrize("arch, width, budget, rule", [
    ("resnet18", 16, "parameters", "hull"), ("wrn28_4", 16, "macs", "hull"),
    *itertools.product(("resnet18", "vgg16", "wrn28_4", "lenet"), [4], ("parameters", "macs"), ("hull", "uniform"))])
def test_cstar_budget_is_exact_and_ranks_never_grow_with_the_ratio(arch, width, budget, rule, monkeypatch):
    network = dict(channels=1 if arch == "lenet" else 3, size=(32, 32))
    model, before = common.build_network(arch, width, classes=10, **network), None
    layers = cstar.factorisable(model)
    weights = {n: m.weight.detach() for n, m in layers.items()}
    for w in weights.values():                                   # power-law spectra in both modes
        s, c = (torch.arange(1, n + 1).view(-1, *[1] * (w.dim() - 1 - i)) for i, n in enumerate(w.shape[:2]))
        w *= s ** -0.7 * c ** -0.4
    places = cstar.positions(model, network) if budget == "macs" else None
    total = common.count_macs(model, network) if places else sum(p.numel() for p in model.parameters())
    each = places or dict.fromkeys(weights, (1, 1))
    begin = time.process_time()
    path = list(cstar.rank_path(weights, each, 1.0 if rule == "uniform" else cstar.FLOOR))
    assert time.process_time() - begin < 20
    monkeypatch.setattr(cstar, "rank_path", lambda *_: path)     # it is the same for all ratios
    for ratio in (2, 3, 4, 8, 16, 32, 48, 64):
        try:
            left = cstar.budget_of(model, ratio, places)
        except common.UsageFault:
            assert ratio > 4 or places
            break
        ranks = cstar.choose_ranks(weights, left, rule, places)
        used = sum(cstar.cost(w.shape, ranks[name], each[name]) for name, w in weights.items())
        thin = copy.deepcopy(model)
        for name, rank in ranks.items():
            thin.set_submodule(name, cstar.factor_layer(layers[name], rank) if rank else layers[name])
        size = common.count_macs(thin, network) if places else sum(p.numel() for p in thin.parameters())
        assert size <= total / ratio and size == int(total // ratio) - left + used
        rank_of_lenet = sum(next(reversed(weights.values())).shape)      # what one more of its linear layer costs
        assert size * ratio > 0.98 * total or arch == "lenet" and (places or left - used < rank_of_lenet)
        full = {n: ranks[n] or tuple(w.shape[:2]) for n, w in weights.items()}
        assert not before or all(a <= b for n in full for a, b in zip(full[n], before[n]))
        before = full


def test_cstar_ranks_are_below_the_floor_only_where_the_budget_is():
    torch.manual_seed(0)
    model = common.build_network("lenet", 4, 1, 10, (28, 28))
    weights = {n: m.weight.detach() for n, m in cstar.factorisable(model).items()}
    convolution, linear = weights
    weights[linear] *= torch.arange(1, 257)[:, None] ** -2.0     # one rank holds most of it: the hull starves it
    ranks = [cstar.choose_ranks(weights, cstar.budget_of(model, ratio)) for ratio in (14, 32)]
    assert ranks[0][linear] == (8,) and ranks[0][convolution] is None                    # 3 % of 256, rounded up
    assert 1 < ranks[1][linear][0] < 8 and ranks[1][convolution] == (1, 1)


def test_cstar_built_network_has_at_most_the_parameters_of_the_ratio(resnet18_weights):
    model, weights = resnet18_weights
    ranks = cstar.choose_ranks(weights, cstar.budget_of(model, 64))
    count = sum(p.numel() for p in cstar.factorise_(copy.deepcopy(model), ranks).parameters())
    assert 0.995 * 11173962 / 64 <= count <= 11173962 / 64


def test_cstar_ranks_ignore_order_and_scale_of_the_layers():
    weights = {"a": decaying(8, 6, 3, 3, seed=1), "b": decaying(6, 8, 3, 3, seed=2),
               "c": decaying(8, 9, seed=3)}
    ranks = cstar.choose_ranks(weights, 500)
    assert cstar.choose_ranks(dict(reversed(weights.items())), 500) == ranks
    assert cstar.choose_ranks(weights | {"a": 10 * weights["a"]}, 500) == ranks
    assert len({r for r in ranks.values()}) > 1
    assert cstar.choose_ranks(weights, 10**6) == dict.fromkeys(weights)


def test_cstar_impossible_ratio_names_the_largest_possible_one():
    model = resnet()
    with pytest.raises(common.UsageFault, match="from 1 to") as fault:
        cstar.budget_of(model, 1000)
    largest = float(re.search(r"to ([\d.]+),", str(fault.value))[1])
    assert cstar.budget_of(model, largest) >= 0
    with pytest.raises(common.UsageFault):
        cstar.budget_of(model, largest + 0.02)


# ---------------------------------------------------------------- CSTAR: ADMM and factors
def one_layer(w):
    layer = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], bias=False).double()
    layer.weight.data = w.clone()
    return layer


def test_cstar_admm_converges_on_a_quadratic():
    target = conv_weight(32, 24, 3, 3)
    layer = one_layer(target)
    admm = cstar.ADMM({"l": layer}, {"l": (8, 6)}, rho=2.0)
    first = (target - admm.z["l"]).square().sum()
    for _ in range(20):
        layer.weight.data = (target + 2 * (admm.z["l"] - admm.u["l"])) / 3   # the exact W-step
        residual = admm.update()
    # Feasible, and better than cutting at once.
    assert residual < 1e-2 and (target - admm.z["l"]).square().sum() < first


@pytest.mark.parametrize("layer, rank, size", [
    (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (3, 4), 9),
    (nn.Conv2d(6, 8, 3, dilation=2, padding=2), (2, 5), 9), (nn.Conv2d(6, 8, 1, stride=2), (4,), 9),
    (nn.Conv2d(6, 8, (1, 3), padding=(0, 1)), (3, 3), 9), (nn.Linear(6, 8), (3,), 0)])
def test_cstar_factorised_layer_equals_the_projected_one(layer, rank, size):
    x = torch.randn(3, 6, size, size) if size else torch.randn(3, 6)
    model = nn.Sequential(copy.deepcopy(layer))
    thin = cstar.factorise_(copy.deepcopy(model), {"0": rank})
    model[0].weight.data = cstar.project(model[0].weight.data, rank)
    assert isinstance(thin[0], nn.Sequential)
    assert torch.allclose(thin(x), model(x), atol=1e-5, rtol=1e-5)
    count = cstar.cost(layer.weight.shape, rank) + (layer.bias is not None) * 8
    assert sum(p.numel() for p in thin.parameters()) == count


def test_cstar_factorised_network_equals_the_projected_dense_one():
    model = resnet(width=2).double().eval()
    layers = cstar.factorisable(model)
    weights = {n: m.weight.detach() for n, m in layers.items()}
    ranks = cstar.choose_ranks(weights, cstar.budget_of(model, 4))
    thin, x = cstar.factorise_(copy.deepcopy(model), ranks), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    unequal = (thin(x) - model(x)).abs().max()
    for name, layer in layers.items():
        layer.weight.data = cstar.project(layer.weight.data, ranks[name])
    assert (thin(x) - model(x)).abs().max() < 1e-5 * model(x).abs().max() < unequal
    x_adv = [common.pgd(m, x, torch.arange(4), 0.2, 0.05, 5, random_start=False) for m in (thin, model)]
    assert torch.allclose(*x_adv, atol=1e-6)


def test_cstar_batch_norm_is_the_average_over_batches():
    model = nn.Sequential(nn.BatchNorm2d(2))
    batches = [(torch.randn(8, 2, 3, 3) + i, None) for i in range(4)]
    cstar.reestimate_batchnorm_(model, batches, most=3)
    average = torch.stack([x.mean((0, 2, 3)) for x, _ in batches[:3]]).mean(0)
    assert torch.allclose(model[0].running_mean, average, atol=1e-6)
    assert model[0].momentum == 0.1


# ---------------------------------------------------------------- ADMM pruning
SCHEMES = ["filter", "column", "irregular"]


def supports(shape, scheme, count):
    """All masks of a shape (S, ...) that keep `count` units."""
    rows, columns = shape[0], math.prod(shape[1:])
    units = dict(filter=rows, column=columns, irregular=rows * columns)[scheme]
    for chosen in itertools.combinations(range(units), count):
        mask = torch.zeros(units, dtype=torch.bool)
        mask[list(chosen)] = True
        mask = mask.view(dict(filter=(-1, 1), column=(1, -1), irregular=(rows, columns))[scheme])
        yield mask.expand(rows, columns).reshape(shape)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 2, 2, 1), (4, 3), (2, 5, 1, 1), (1, 4, 2, 1)])
def test_admm_projection_is_the_nearest_of_all_supports(scheme, shape):
    w = conv_weight(*shape)
    units = len(admm_prune.importance(w, scheme))
    for count in range(1, units + 1):
        mask = admm_prune.choose_masks({0: w}, scheme, units / count)[0]
        ours = admm_prune.project(w, mask)
        best = min((w - w * other).square().sum() for other in supports(shape, scheme, count))
        assert any(torch.equal(mask, other) for other in supports(shape, scheme, count))
        assert (w - ours).square().sum() == pytest.approx(best.item(), abs=1e-12)
        assert torch.equal(ours[mask], w[mask]) and torch.equal(admm_prune.choose_masks(
            {0: -8 * ours}, scheme, units / count)[0], mask)                 # idempotent, whatever the scale


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ratio", [1, 1.1, 2, 16 / 5, 10, 16, 10000])
def test_admm_keeps_exactly_ceil_n_over_ratio_units_also_of_equal_ones(scheme, ratio):
    tiny_ones, ties = torch.full((9, 9), 1e-30), torch.randn(6, 27).round()
    for w in (torch.ones(64, 3, 3, 3), torch.zeros(7, 5), tiny_ones, ties):
        before = w.clone()
        n = len(admm_prune.importance(w, scheme))
        mask = admm_prune.choose_masks({0: w}, scheme, ratio)[0]
        projected = admm_prune.project(w, mask)
        whole_units = {"filter": mask.flatten(1).any(1), "column": mask.flatten(1).any(0),
                       "irregular": mask.flatten()}[scheme]
        assert int(whole_units.sum()) == -(-n // Fraction(ratio).limit_denominator(1000))
        assert int(mask.sum()) * n == int(whole_units.sum()) * w.numel()
        assert torch.equal(w, before) and projected.data_ptr() != w.data_ptr()
        if len(w.unique()) == 1:
            assert whole_units[:int(whole_units.sum())].all()                # the first among equals
            assert torch.equal(projected != 0, mask & (w != 0))
    with pytest.raises(common.Fault, match="not finite"):
        admm_prune.choose_masks({0: torch.full((3, 3), math.nan)}, scheme, ratio)


def shaken(arch, width, channels, size, dtype=torch.float64, **more):
    """A network whose batch norms and biases are not the neutral ones of an untrained network."""
    torch.manual_seed(0)
    model = binary_relax.make_network(arch, (size, size), width=width, channels=channels, classes=10, **more)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.uniform_(0.5, 1.5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model.to(dtype)


def filter_masks(model, ratio, grouped=False):
    weights = {name: layer.weight for name, layer in admm_prune.prunable(model).items()}
    tied = [list(writers) for writers, _, _ in common.channel_groups(model)] if grouped else ()
    return admm_prune.choose_masks(weights, "filter", ratio, tied)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("arch, channels, size, grouped", [
    ("lenet", 1, 12, False), ("lenet", 3, 16, False), ("vgg16", 3, 32, False), ("resnet18", 3, 16, False),
    ("resnet18", 3, 16, True), ("wrn28_4", 2, 8, False), ("wrn28_4", 2, 8, True)])
def test_admm_smaller_network_equals_the_masked_one(arch, channels, size, grouped, dtype, tolerance):
    model = shaken(arch, 2, channels, size, dtype)
    masks = common.parameter_masks(model, filter_masks(model, 2, grouped), True)
    constants = copy.deepcopy(model).eval()                      # of dead filters, which must go with them
    common.apply_masks_(constants, {name: mask for name, mask in masks.items() if mask.dim() > 1})
    common.apply_masks_(model, masks)
    small, left = common.remove_filters_(copy.deepcopy(model).eval(), masks)
    assert not any(m.training for m in small.modules())
    x = torch.rand(6, channels, size, size, dtype=dtype)
    assert (small(x) - constants(x)).abs().max() > 1e-3 * constants(x).abs().max()
    for training in (False, True):                               # with running and with batch statistics
        full = copy.deepcopy(model).train(training)(x)
        assert (small.train(training)(x) - full).abs().max() <= tolerance * full.abs().max()
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert counts[0] < counts[1] / 2
    parameters = dict(small.named_parameters())
    assert all((parameters[name][~mask] == 0).all() for name, mask in left.items())
    assert all(mask.all() for mask in left.values()) == (grouped or arch in ("lenet", "vgg16"))


@pytest.mark.parametrize("arch, channels, size, width, grouped", [
    ("lenet", 1, 28, 16, False), ("lenet", 3, 32, 8, False), ("vgg16", 3, 32, 8, False),
    ("resnet18", 3, 32, 8, True), ("wrn28_4", 3, 32, 8, True)])
def test_admm_removal_gives_the_parameter_counts_of_the_target_width(arch, channels, size, width, grouped):
    for target in (1, 2, 4):
        model = common.build_network(arch, width, channels, 10, (size, size))
        masks = common.parameter_masks(model, filter_masks(model, width / target, grouped), True)
        small, _ = common.remove_filters_(model, masks)
        wanted = common.build_network(arch, target, channels, 10, (size, size)).state_dict()
        assert {k: t.shape for k, t in small.state_dict().items()} == {k: t.shape for k, t in wanted.items()}


def test_admm_group_residual_gives_one_mask_by_the_joint_norm():
    model = shaken("resnet18", 2, 3, 8)
    masks, groups = filter_masks(model, 4, grouped=True), common.channel_groups(model)
    assert sorted(name for writers, _, _ in groups for name in writers) == sorted(masks)
    for writers, _, _ in groups:
        alive = {name: masks[name].flatten(1).any(1) for name in writers}
        joint = sum(model.get_submodule(name).weight.flatten(1).square().sum(1) for name in writers)
        best = joint.topk(len(joint) // 4).indices
        assert all(set(a.nonzero().flatten().tolist()) == set(best.tolist()) for a in alive.values())
    assert max(len(writers) for writers, _, _ in groups) == 3


def pruning(w, scheme="irregular", ratio=3, **more):
    layer = one_layer(w)
    choose = functools.partial(admm_prune.choose_masks, scheme=scheme, ratio=ratio)
    return layer, admm_prune.ADMM(layer, choose, **more)


def low_rank(w, hooi, rho):
    layer = one_layer(w)
    return layer, cstar.ADMM({"weight": layer}, {"weight": (2, 2)}, rho, hooi)


@pytest.mark.parametrize("maker, project", [
    *((functools.partial(low_rank, hooi=n), lambda v, n=n: cstar.project(v, (2, 2), n)) for n in (0, 2)),
    *((functools.partial(pruning, scheme=s), lambda v, s=s: v * admm_prune.choose_masks(
        {0: v}, s, 3)[0]) for s in SCHEMES)])
def test_admm_penalty_gradient_is_rho_times_w_minus_z_plus_u_after_any_number_of_updates(maker, project):
    layer, admm = maker(conv_weight(5, 4, 3, 3), rho=0.7)
    assert torch.equal(admm.z["weight"], project(layer.weight)) and not admm.u["weight"].any()
    for updates in range(6):
        z, u, w = admm.z["weight"], admm.u["weight"], layer.weight.detach().clone()
        gradient, = torch.autograd.grad(admm.penalty(), layer.weight)
        assert torch.allclose(gradient, 0.7 * (w - z + u)) and not u.requires_grad and not z.requires_grad
        admm.update()
        assert torch.allclose(admm.z["weight"], project(w + u))                  # CSTAR [F], ADMM [E]
        assert torch.allclose(admm.u["weight"], u + w - admm.z["weight"])        # CSTAR [G], ADMM [F]
        assert torch.equal(layer.weight, w)
        layer.weight.data += 0.1 * conv_weight(5, 4, 3, 3, seed=updates + 1)


def test_admm_pulls_all_of_a_filter_that_the_cut_sets_to_zero():
    model = shaken("vgg16", 1, 3, 32)
    admm = admm_prune.ADMM(model, lambda p: common.parameter_masks(model, filter_masks(model, 2), True), rho=0.7)
    admm.update()
    gradients = torch.autograd.grad(admm.penalty(), admm.weights.values())
    cut = copy.deepcopy(model)
    common.apply_masks_(cut, admm.masks)
    names = {name.rpartition(".")[2] for name in admm.z}
    assert names == {"weight", "bias"} and "features.1.bias" in admm.z and "classifier.weight" not in admm.z
    for gradient, (name, p) in zip(gradients, admm.weights.items()):
        assert torch.allclose(gradient, 0.7 * (p - admm.z[name] + admm.u[name]))
        assert not admm.z[name][cut.get_parameter(name) == 0].any() and (admm.z[name] == 0).any()


def test_admm_rho_grows_to_its_cap_and_the_multiplier_rho_u_is_not_changed_by_that():
    layer, admm = pruning(conv_weight(5, 4, 3, 3), rho=0.1, growth=3.0, rho_max=0.5)
    for wanted in (0.3, 0.5, 0.5):
        rho, u = admm.rho, admm.u["weight"]
        admm.update()
        assert admm.rho == pytest.approx(wanted)
        assert torch.allclose(admm.rho * admm.u["weight"], rho * (u + layer.weight.detach() - admm.z["weight"]))
    layer, admm = pruning(conv_weight(5, 4, 3, 3), rho=0.7, growth=3.0, rho_max=0.5)
    admm.update()
    assert admm.rho == 0.7                                                               # never lowered


def test_admm_converges_on_a_quadratic_no_worse_than_the_cut():
    target, curvature = conv_weight(4, 3, 1, 1), 1 + 3 * conv_weight(4, 3, 1, 1, seed=1).abs()
    layer, admm = pruning(target, rho=10.0, ratio=3)
    for _ in range(300):                                         # the exact W-step of sum c (w - t)^2 / 2
        layer.weight.data = (curvature * target + 10 * (admm.z["weight"] - admm.u["weight"])) / (curvature + 10)
        residual, changed = admm.update()
    assert residual < 1e-6 and changed == 0
    cost = [(curvature * (target - z).square()).sum().item()
            for z in (admm.z["weight"], admm_prune.project(target, admm_prune.choose_masks(
                {0: target}, "irregular", 3)[0]))]
    assert cost[0] <= cost[1] and int((admm.z["weight"] != 0).sum()) == 4


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True),
    lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_admm_zeros_survive_every_optimizer_also_a_used_one(optimizer, scheme):
    model, x, y = resnet().train(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    used = optimizer(model.parameters())
    weights = {name: layer.weight for name, layer in admm_prune.prunable(model).items()}
    masks = common.parameter_masks(model, admm_prune.choose_masks(weights, scheme, 3), scheme == "filter")
    assert (set(masks) - {f"{n}.weight" for n in weights} != set()) == (scheme == "filter")
    args = cstar.get_args("--dataset digits --num-steps 1 --device cpu --amp off".split())
    schedule = torch.optim.lr_scheduler.ConstantLR(used)
    admm_prune.train_epoch(model, [(x, y)], used, schedule, args)                        # momentum everywhere
    common.apply_masks_(model, masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    admm_prune.train_epoch(model, [(x, y)] * 20, used, schedule, args, masks=masks)
    for name, p in model.named_parameters():
        mask = masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert (p[~mask] == 0).all() and not torch.equal(p[mask], before[name][mask])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_admm_run_prunes_every_layer_exactly_and_writes_a_smaller_file(whole, scheme):
    folder, result = whole(admm_prune, "--scheme", scheme)
    dense, model = (common.load_model(folder / name) for name in ("dense.pt", "model.pt"))
    for name, layer in admm_prune.prunable(dense).items():
        w = layer.weight
        units = dict(filter=len(w), column=w[0].numel(), irregular=w.numel())[scheme]
        assert result["kept"][f"{name}.weight"] == -(-units // 4) * w.numel() // units
    assert result["nonzeros"] < 0.4 * result["dense_parameters"]
    assert os.path.getsize(folder / "model.pt") == result["bytes"] < 0.55 * result["dense_bytes"]
    if scheme == "filter":
        assert result["parameters"] < 0.4 * result["dense_parameters"] and result["macs_ratio"] > 2
    else:                                                        # strictly into the plain network
        resnet().load_state_dict(model.state_dict())
        zero = {name: (p == 0).float().mean() for name, p in model.named_parameters() if p.dim() == 4}
        assert all(0.6 < share < 0.8 for share in zero.values())
    x = torch.rand(3, 1, 8, 8)
    assert torch.isfinite(model(x)).all() and not torch.allclose(model(x), dense(x), atol=1e-3)


def phases_of(folder, method="admm"):
    phases = [json.loads(line).get("phase") for line in open(folder / "log.jsonl")]
    return [phases.count(phase) for phase in ("pretrain", method, "finetune")]


def test_admm_modes_spend_the_same_epochs_on_networks_of_one_size(tmp_path):
    more = "--device cpu --arch lenet --width 4 --target-width 2".split()
    flags = [*TINY[:TINY.index("--ratio")], *more]
    results = {}
    for mode, more, phases in (("admm", (), [2, 2, 2]), ("post", (), [2, 0, 4]), ("scratch", (), [6, 0, 0]),
                               ("ticket", ("--ticket", str(tmp_path / "admm/ticket.pt")), [0, 0, 6])):
        results[mode] = admm_prune.main([*flags, "--mode", mode, *more, "--output", str(tmp_path / mode)])
        assert phases_of(tmp_path / mode) == phases
    assert len({r["parameters"] for r in results.values()}) == 1 == results["scratch"]["params_ratio"]
    assert results["ticket"]["dense"] == results["admm"]["dense"]
    rho = 3 * (1 - 0.9) / (0.1 / 2 * 4)                          # three time constants in the epoch's four steps
    assert [results[mode]["rho"] for mode in ("admm", "post")] == [pytest.approx(rho), None]
    assert len({json.dumps(r["kept"]) for m, r in results.items() if m != "scratch"}) == 1


def test_admm_ticket_is_the_initial_network_cut_like_the_pruned_one(whole, tmp_path):
    folder, _ = whole(admm_prune)
    ticket = common.read_model(folder / "ticket.pt")[0]
    torch.manual_seed(0)
    initial = common.build_network("resnet18", 1, 1, 10, (8, 8))
    assert all(torch.equal(ticket["state"][k], v) for k, v in initial.state_dict().items())
    common.apply_masks_(initial, ticket["masks"])
    small, _ = common.remove_filters_(initial, ticket["masks"])
    no_epochs = "--pretrain-epochs 0 --admm-epochs 0 --finetune-epochs 0 --mode ticket".split()
    flags = [*TINY, *no_epochs, "--ticket", str(folder / "ticket.pt"), "--output", str(tmp_path / "run")]
    admm_prune.main(flags)
    cut = weights_of(tmp_path / "run/model.pt")
    assert all(torch.equal(cut[k], v) for k, v in small.state_dict().items())
    masks, name = ticket["masks"], "layer1.0.conv1.weight"
    alive = {n: mask.flatten(1).any(1) for n, mask in masks.items() if mask.dim() > 1}
    stream = alive["conv1.weight"] | alive["layer1.0.conv2.weight"] | alive["layer1.1.conv2.weight"]
    wanted = ticket["state"][name][alive[name]][:, stream]       # filters that are left, and what they read
    assert torch.equal(cut[name], wanted) and 0 < len(wanted) < len(alive[name])
    with pytest.raises(common.UsageFault, match="is not a ticket of"):
        admm_prune.main([*flags, "--ratio", "2"])
    with pytest.raises(common.UsageFault, match="--pretrained: .*ticket.pt holds ticket"):
        admm_prune.main([*flags[:flags.index("--mode")], "--pretrained", str(folder / "ticket.pt")])


def test_admm_radius_ramps_up_and_updates_come_at_their_interval(tmp_path):
    tiny(tmp_path / "run", *"--ramp-epochs 2 --pretrain-epochs 3 --admm-epochs 5 --admm-interval 2".split(),
         script=admm_prune)
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert ["residual" in line for line in lines if line.get("phase") == "admm"] == [0, 1, 0, 1, 0]
    assert [line["strength"] for line in lines if line.get("phase") == "pretrain"] == [0.5, 1, 1]
    assert [line["rho"] for line in lines if "residual" in line] == pytest.approx([0.75] * 2)    # 8 steps
    seen, args = [], cstar.get_args("--dataset digits --device cpu --amp off --num-steps 3".split())
    model = resnet()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    schedule, x = torch.optim.lr_scheduler.ConstantLR(optimizer), torch.full((4, 1, 8, 8), 0.5)
    admm_prune.train_epoch(model, [(x, torch.arange(4))], optimizer, schedule, args, strength=0.5)
    assert 0.05 < (seen[-1] - x).abs().max() <= 0.5 * args.epsilon + 1e-6


def test_files_leave_zeros_out_and_give_them_back(tmp_path):
    args = cstar.get_args(["--dataset", "digits", "--device", "cpu"])
    network, sizes = dict(arch="lenet", width=16, channels=1, classes=10, size=[8, 8]), {}
    for kind in ("dense", "single", "column"):
        torch.manual_seed(1)
        model = common.build_network(**network)
        for p in model.parameters():                             # one weight or column in ten is kept
            keep = torch.ones_like(p) if kind == "dense" or p.dim() == 1 else torch.rand(
                p.shape if kind == "single" else p.shape[1:]) < 0.1
            p.data *= keep
        common.save_model(tmp_path / f"{kind}.pt", "admm_prune", "compact", network, model, args)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights_of(tmp_path / f"{kind}.pt").items())
        count, kept = (sum(f(p) for p in model.parameters()) for f in (torch.numel, torch.count_nonzero))
        sizes[kind] = (os.path.getsize(tmp_path / f"{kind}.pt") - 4 * int(kept)) * 8 / count
    entropy = -0.1 * math.log2(0.1) - 0.9 * math.log2(0.9)           # 0.469 bits a weight; a plain map takes 1
    assert sizes["dense"] < 0.15 and sizes["column"] < 0.2 and sizes["single"] < 1.3 * entropy + 0.15


# ---------------------------------------------------------------- HYDRA: scores and masks
@pytest.mark.parametrize("ratio", [1, 3, 10, 1e4])
def test_hydra_masks_are_exact_for_odd_sizes_ties_and_channels_last(ratio):
    random = conv_weight(7, 5, 3, 3).float()
    last = random.to(memory_format=torch.channels_last)
    for s in (random, last, random[:, 0, 0, 0], torch.ones(7, 5, 3, 3), torch.zeros(9, 3), random.round()):
        mask, size = hydra_prune.choose_mask(s, ratio), s.abs().flatten()
        kept, flat = -(-s.numel() // int(ratio)), mask.flatten()
        assert mask.dtype == torch.bool and mask.shape == s.shape and int(mask.sum()) == kept
        assert kept == len(size) or size[flat].min() >= size[~flat].max()
        if len(s.unique()) == 1:
            assert flat[:kept].all()                             # the first among equals
    scores = hydra_prune.Scores(resnet(), "irregular", ratio)
    scores.s[3].data[0, 0] = math.inf
    with pytest.raises(common.Fault, match="not finite"):
        scores.masks()


def test_hydra_first_scores_are_scaled_weights_and_give_the_lowest_magnitude_mask():
    w = conv_weight(6, 4, 3, 3)
    s = hydra_prune.first_score(w, "irregular")
    assert s.abs().max().item() == pytest.approx(math.sqrt(6 / 36)) and torch.equal(s.sign(), w.sign())
    mask = hydra_prune.choose_mask(s, 10)
    assert set(w.abs().flatten().topk(22).indices.tolist()) == set(mask.flatten().nonzero()[:, 0].tolist())
    norms = w.flatten(1).norm(dim=1)
    assert torch.allclose(hydra_prune.first_score(w, "filter"), norms / norms.max())
    for scheme in ("filter", "irregular"):
        assert not hydra_prune.first_score(torch.zeros(3, 2), scheme).any()


@pytest.mark.parametrize("arch", ["cnn_small", "resnet18", "wrn28_4"])
@pytest.mark.parametrize("scheme", ["irregular", "filter"])
def test_hydra_gradients_of_scores_equal_their_formula(scheme, arch):
    model = shaken(arch, 2, 1, 8).eval()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    scores = hydra_prune.Scores(model, scheme, 3)
    count = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert len(scores.s) == count - (scheme == "filter")
    for s in scores.s:                                           # not those that it began with
        s.data *= 1 - 2 * (torch.rand_like(s) < 0.3).double()
        s.data += 0.1 * torch.randn_like(s)
    scores.mask_weights_()
    x, y = torch.rand(5, 1, 8, 8).double(), torch.arange(5)
    F.cross_entropy(model(x), y).backward()
    scores.collect_gradients_()
    for s, held in zip(scores.s, scores.masked):
        m = hydra_prune.choose_mask(s, 3).double()
        m = (m + scores.PRUNED_FACTOR[scheme] * (1 - m)).requires_grad_()            # the network, with m as a leaf
        product = {names[id(p)]: dense[names[id(p)]] * (m if m.shape == p.shape else m.view(
            -1, *[1] * (p.dim() - 1))) for p, _ in held}
        assert all(torch.equal(p, product[names[id(p)]]) and p.grad is None for p, _ in held)
        out = torch.func.functional_call(model, product, x)
        gradient, = torch.autograd.grad(F.cross_entropy(out, y), m)
        assert torch.allclose(s.grad, s.sign() * gradient) and (s.grad[m < 0.5] != 0).any()


@pytest.mark.parametrize("arch", ["cnn_small", "resnet18", "wrn28_4"])
def test_hydra_filter_scores_judge_the_network_that_is_left(arch):
    model = shaken(arch, 2, 1, 8).eval()
    scores = hydra_prune.Scores(model, "filter", 2)
    scores.mask_weights_()
    masks = common.parameter_masks(model, scores.masks(), True)
    x, cut = torch.rand(4, 1, 8, 8).double(), copy.deepcopy(model)
    common.apply_masks_(cut, masks)
    if arch == "wrn28_4":                                        # norms on a sum are not one filter's
        shared = [f"{norm}.{p}" for _, on_sum, _ in common.channel_groups(model)
                  for norm in on_sum for p in ("weight", "bias")]
        cut.load_state_dict(cut.state_dict() | {k: model.state_dict()[k] for k in shared})
    assert (cut(x) - model(x)).abs().max() < 0.01 * cut(x).abs().max()
    assert int(sum((~mask).sum() for mask in masks.values())) > 100


def test_hydra_prune_phase_moves_scores_and_batch_norms_alone_and_finetuning_kept_weights_alone():
    args = hydra_prune.get_args("--dataset digits --num-steps 1 --device cpu --amp off".split())
    model, x, y = resnet(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    scores = hydra_prune.Scores(model, "irregular", 5)
    scores.mask_weights_()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in (scores.state_dict() | model.state_dict()).items()}
    optimizer = torch.optim.SGD(nn.ModuleList([scores, *norms]).parameters(), 5.0, 0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    hydra_prune.train_epoch(model, [(x, y)] * 3, optimizer, schedule, args, scores)
    after = scores.state_dict() | model.state_dict()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        weight = re.fullmatch(r"w\d+_0|linear\.bias", name)
        assert not moved if weight else moved or "weight" in name, name
    masks = common.parameter_masks(model, scores.masks(), False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    hydra_prune.train_epoch(model, [(x, y)] * 3, optimizer, schedule, args, masks=masks)
    for name, mask in masks.items():
        w = model.state_dict()[name]
        assert not w[~mask].any() and not torch.equal(w[mask], before[name][mask])


def test_hydra_radius_grows_by_steps_and_the_pruning_phase_trains_batch_norms(tmp_path, monkeypatch):
    radii, times = [], []
    monkeypatch.setattr(hydra_prune, "pgd", lambda model, x, y, epsilon, *_: radii.append(epsilon) or x)
    monkeypatch.setattr(common, "progress", lambda items, label, *more: times.append((label, *more)) or items)
    unevaluated(monkeypatch)
    tiny(tmp_path / "run", *"--ramp-epochs 2 --pretrain-epochs 3 --finetune-epochs 0".split(), script=hydra_prune)
    assert radii == pytest.approx([0.2 * min(1, (step + 1) / 8) for step in range(20)])
    epochs = [f"pretrain {i}/3" for i in (1, 2, 3)] + ["prune 1/2", "prune 2/2"]     # time to go: of all steps
    assert times == [(epoch, 4, 4 * (4 - i)) for i, epoch in enumerate(epochs)]
    dense, model = (weights_of(tmp_path / "run" / name) for name in ("dense.pt", "model.pt"))
    assert not torch.equal(dense["layer1.0.bn1.weight"], model["layer1.0.bn1.weight"])


def test_hydra_without_pruning_epochs_is_lwm(whole, tmp_path, monkeypatch):
    assert whole(hydra_prune)[1]["mask_changed"] > 0
    unevaluated(monkeypatch)
    found = [tiny(tmp_path / name, "--scores", name, "--prune-epochs", "0", script=hydra_prune)
             for name in ("hydra", "lwm")]
    assert same_weights(tmp_path / "hydra/model.pt", tmp_path / "lwm/model.pt") and found[0]["mask_changed"] == 0
    tiny(tmp_path / "longer", "--scores", "lwm", script=hydra_prune)
    assert [phases_of(tmp_path / name)[0::2] for name in ("lwm", "longer")] == [[2, 2], [2, 4]]


@pytest.mark.parametrize("objective", hydra_prune.OBJECTIVES)
@pytest.mark.parametrize("scheme", ["irregular", "filter"])
def test_hydra_run_of_every_objective_keeps_its_count_and_writes_a_smaller_file(tmp_path, objective, scheme,
                                                                                capsys):
    result = tiny(tmp_path / "run", "--objective", objective, "--scheme", scheme, "--arch", "cnn_small",
                  "--width", "8", script=hydra_prune)
    dense = common.load_model(tmp_path / "run/dense.pt")
    for name, layer in hydra_prune.prunable(dense, scheme).items():
        units = layer.weight.numel() if scheme == "irregular" else len(layer.weight)
        assert result["kept"][f"{name}.weight"] == -(-units // 4) * (layer.weight.numel() // units)
    assert result["bytes"] < 0.6 * result["dense_bytes"]
    assert 0 <= result["verified_acc"] <= result["robust_acc"] <= result["clean_acc"]
    assert ("tools/evaluate.py" in capsys.readouterr().out.splitlines()[-1]) == (objective == "smooth")


def test_hydra_objectives_are_their_formulas(digits):
    model, x, y = resnet(), common.to_float(digits.train[0][:20]), digits.train[1][:20]
    for name in ("natural", "pgd", "trades --beta 3", "smooth --beta 3 --sigma 0.5"):
        flags = f"--dataset digits --device cpu --num-steps 4 --objective {name}"
        args, name = hydra_prune.get_args(flags.split()), name.split()[0]
        seen, before = [], copy.deepcopy(model)
        hook = model.register_forward_pre_hook(lambda m, got: seen.append((m.training, got[0].detach())))
        torch.manual_seed(1)
        loss, _ = hydra_prune.objective(model.eval(), x, y, args, 1.0)
        hook.remove()
        inputs = [image for training, image in seen if training]
        torch.manual_seed(1)
        if name == "trades":                                     # TRADES begins beside the image
            assert 0 < (seen[1][1] - x).abs().max() < 0.01
        if name in ("natural", "pgd"):
            near = x if name == "natural" else common.pgd(before.eval(), x, y, 0.2, 0.05, 4)
            wanted = F.cross_entropy(model.train()(near), y)
            assert len(inputs) == 1 and torch.equal(inputs[0], near)
        else:
            assert torch.equal(inputs[0], x) and len(inputs) == 2
            p, q = (F.softmax(model.train()(image), 1) for image in inputs)
            divergence = (p * (p.log() - q.log())).sum(1).mean()
            wanted = F.cross_entropy(model(x), y) + 3 * divergence
        assert torch.allclose(loss, wanted, rtol=1e-4), name
        distance = (inputs[-1] - x).abs().max()
        if name == "smooth":                                     # noise that nothing clamps
            assert inputs[-1].min() < -0.5 and (inputs[-1] - x).std().item() == pytest.approx(0.5, rel=0.1)
        else:
            assert distance <= 0.2 + 1e-6 and inputs[-1].min() >= 0 and inputs[-1].max() <= 1


def test_hydra_trades_attack_raises_the_divergence(robust, digits):
    args = hydra_prune.get_args("--dataset digits --device cpu --objective trades".split())
    x, y = common.to_float(digits.test[0][:60]), digits.test[1][:60]
    seen = []
    hook = robust.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    hydra_prune.objective(robust, x, y, args, 1.0)
    hook.remove()
    with torch.no_grad():
        clean = robust.eval()(x)
        found, noise = (hydra_prune.kl(robust(near), clean).mean() for near in
                        (seen[-1], (x + 0.2 * torch.randn_like(x).sign()).clamp(0, 1)))
    assert found > 3 * noise


# ---------------------------------------------------------------- HYDRA: bounds
def chain(seed, kind="linear"):
    """A small random network of plain layers, its images and labels, in float64."""
    torch.manual_seed(seed)
    if kind == "odd":                                            # sizes that a stride does not divide
        layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(
            4, 4, (2, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False), nn.ReLU(inplace=True),
            nn.Flatten(), nn.LazyLinear(3)]
        x = torch.rand(4, 2, 8, 7)
    elif kind != "linear":
        layers = common.build_network(kind, 1, 2, 3, (8, 7))
        x = torch.rand(4, 2, 8, 7)
    else:
        layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)]
        x = torch.rand(4, 6)
    model = nn.Sequential(*layers)
    model(x)
    return model.double(), x.double(), torch.tensor([0, 1, 2, 1])


def all_bounds(model, x, y, epsilon, **room):
    layers = hydra_prune.plain_layers(model)
    boxes = hydra_prune.interval_boxes(layers, x, epsilon)
    found = {name: hydra_prune.margins(layers, boxes, y, slope) for name, slope in
             (("ibp", None), ("zero", "zero"), ("crown", "half"))}
    return found | dict(cheap=hydra_prune.cheap_margins(layers, boxes, y),
                        symbolic=hydra_prune.symbolic_margins(layers, boxes, y, **room))


def forward_symbols(model, x, y, epsilon):
    """The symbolic bounds by their other definition: rows of a matrix, one a symbol, passed forward."""
    found = []
    for image, label in zip(x, y):
        low, up = (image - epsilon).clamp(min=0), (image + epsilon).clamp(max=1)
        center, symbols = (low + up) / 2, torch.diag((up - low).flatten() / 2).view(-1, *image.shape)
        for layer in model:
            if not isinstance(layer, nn.ReLU):
                symbols = layer(symbols) - layer(torch.zeros_like(center)[None])
                center = layer(center[None])[0]
                continue
            low, up = (center + s * symbols.abs().sum(0) for s in (-1, 1))
            slope = torch.where(low >= 0, 1.0, torch.where(up <= 0, 0.0, up / (up - low)))
            half = torch.where((low < 0) & (up > 0), -slope * low / 2, 0.0)
            center, new = slope * center + half, torch.diag(half.flatten()).view(-1, *half.shape)
            symbols = torch.cat([slope * symbols, new])
        found.append(center[label] - center - (symbols[:, label, None] - symbols).abs().sum(0))
    return torch.stack(found)


def margins(model, x, y):
    logits = model(x)
    return logits.gather(1, y[:, None]) - logits


@pytest.mark.parametrize("kind", ["linear", "odd", "cnn_small", "cnn_large"])
@pytest.mark.parametrize("seed", range(5))
def test_hydra_bounds_contain_samples_corners_and_attacks(kind, seed):
    model, x, y = chain(seed, kind)
    generator, found = torch.Generator().manual_seed(seed), margins(model, x, y)
    bounds, in_place = all_bounds(model, x, y, 0.15), copy.deepcopy(model)
    for layer in in_place:
        layer.inplace = True
    for name, bound in all_bounds(in_place, x, y, 0.15).items():
        assert torch.equal(bound, bounds[name])
    for i in range(400):
        noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        points = (x + 0.15 * (noise.sign() if i % 2 else noise)).clamp(0, 1)
        found = torch.minimum(found, margins(model, points, y))
    for loss in ("ce", "margin"):
        attacked = common.pgd(model, x, y, 0.15, 0.03, 30, loss=loss, generator=generator)
        found = torch.minimum(found, margins(model, attacked.double(), y))
    for bound in bounds.values():
        assert (bound <= found + 1e-9).all()
    assert (bounds["zero"] >= bounds["ibp"] - 1e-9).all() and (bounds["zero"] > bounds["ibp"] + 1e-4).any()
    assert (bounds["cheap"] == torch.stack([bounds[k] for k in ("ibp", "zero", "crown")]).amax(0)).all()
    for room in ({}, dict(room=1)):                              # room for one unit at a time
        symbolic = all_bounds(model, x, y, 0.15, **room)["symbolic"]
        assert torch.allclose(symbolic, forward_symbols(model, x, y, 0.15), rtol=0, atol=1e-12)
    exact = margins(model, x, y)
    assert all(torch.allclose(bound, exact) for bound in all_bounds(model, x, y, 0.0).values())
    assert (bounds["ibp"] <= all_bounds(model, x, y, 0.1)["ibp"] + 1e-9).all()


def test_hydra_bounds_are_exact_for_a_linear_network():
    w, x, y = conv_weight(3, 5), torch.rand(4, 5).double(), torch.tensor([0, 2, 1, 0])
    model = linear(w.float())[1:].double()
    difference = w.float().double()[y][:, None] - w.float().double()
    lower, upper = (x - 0.3).clamp(min=0), (x + 0.3).clamp(max=1)
    worst = torch.where(difference > 0, lower[:, None], upper[:, None])
    for bound in all_bounds(model, x, y, 0.3).values():
        assert torch.allclose(bound, (difference * worst).sum(2), atol=1e-12)


@pytest.mark.parametrize("low, high", [(-0.3, 0.5), (-0.6, 0.2), (0.1, 0.4), (-0.5, -0.1), (0.0, 0.3)])
def test_hydra_bounds_of_one_neuron_are_exact(low, high):
    """f_0 - f_1 = c relu(z), z in [low, high]: the line above is reached at both ends, slope 0 at z < 0."""
    for c in (-2.0, 3.0):
        model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
        model.load_state_dict({k: torch.tensor(v).double() for k, v in {
            "0.weight": [[1.0]], "0.bias": [-0.5], "2.weight": [[c], [0.0]], "2.bias": [0.7, 0.0]}.items()})
        x = torch.tensor([[0.5 + (low + high) / 2]]).double()
        bounds = all_bounds(model, x, torch.tensor([0]), (high - low) / 2)
        exact = 0.7 + min(c * max(low, 0), c * max(high, 0))
        assert [bounds[k][0, 1].item() for k in ("zero", "ibp")] == pytest.approx([exact] * 2, abs=1e-6)
        below = low if low < 0 < high and high > -low else max(low, 0)       # slope 1 where high is larger
        wanted = exact if c < 0 else 0.7 + c * below
        assert bounds["crown"][0, 1].item() == pytest.approx(wanted, abs=1e-6)
        least = max(low, -0.5)                                   # where the pixel is 0
        wanted = exact if c < 0 else 0.7 + c * (least * high / (high - least) if low < 0 < high else max(low, 0))
        assert bounds["symbolic"][0, 1].item() == pytest.approx(wanted, abs=1e-6)


def test_hydra_bounds_neither_symbolic_nor_cheap_dominate():
    bounds = [all_bounds(*chain(seed, kind), 0.15) for seed in range(6) for kind in ("linear", "odd")]
    gains = torch.cat([found["symbolic"] - found["cheap"] for found in bounds])
    assert gains.max() > 0.05 and gains.min() < -0.02


@pytest.mark.parametrize("seed", range(20))
def test_hydra_bounds_never_exceed_the_exact_margin_of_a_mixed_integer_program(seed):
    optimize = pytest.importorskip("scipy.optimize")
    model, x, y = chain(seed)
    x, y, epsilon = x[:1], y[:1], 0.2
    layers = hydra_prune.plain_layers(model)
    boxes = [(low[0].detach().numpy(), up[0].detach().numpy())
             for low, up in hydra_prune.interval_boxes(layers, x, epsilon)]
    w1, w2, w3 = (layers[i].weight.detach().numpy() for i in (0, 2, 4))
    b1, b2, b3 = (layers[i].bias.detach().numpy() for i in (0, 2, 4))
    n, (h1, h2) = 6 + 24 + 24, (slice(6, 18), slice(30, 42))     # x, h1, its switches, h2, its switches
    rows, lows, highs = [], [], []
    for w, b, source, h, (low, up) in ((w1, b1, slice(0, 6), 6, boxes[1]), (w2, b2, h1, 30, boxes[3])):
        for i in range(12):
            def row(h_factor, w_factor, switch, least, most):
                line = np.zeros(n)
                line[h + i], line[h + 12 + i] = h_factor, switch
                line[source] += w_factor * w[i]
                rows.append(line), lows.append(least), highs.append(most)
            row(1, -1, 0, b[i], np.inf)                          # h >= z = w x + b
            row(1, -1, -min(low[i], 0), -np.inf, b[i] - min(low[i], 0))      # h <= z - low (1 - switch)
            row(1, 0, -max(up[i], 0), -np.inf, 0)                # h <= up * switch
    bounds = optimize.Bounds(
        np.r_[boxes[0][0], np.zeros(48)],
        np.r_[boxes[0][1], np.maximum(boxes[1][1], 0), np.ones(12), np.maximum(boxes[3][1], 0), np.ones(12)])
    whole_numbers = np.r_[np.zeros(18), np.ones(12), np.zeros(12), np.ones(12)]
    ours = all_bounds(model, x, y, epsilon)
    points = (x + epsilon * (2 * torch.rand(5000, 6).double() - 1)).clamp(0, 1)
    sampled = margins(model, points, y.expand(5000)).amin(0)
    for j in set(range(3)) - {int(y)}:
        c = np.zeros(n)
        c[h2] = w3[int(y)] - w3[j]
        solved = optimize.milp(c, constraints=optimize.LinearConstraint(np.array(rows), lows, highs),
                               bounds=bounds, integrality=whole_numbers)
        exact = solved.fun + b3[int(y)] - b3[j]
        assert all(bound[0, j] <= exact + 1e-5 for bound in ours.values()) and exact <= sampled[j] + 1e-5


def test_hydra_bounds_do_not_depend_on_other_images_and_are_those_of_the_file(tmp_path):
    result = tiny(tmp_path / "run", "--objective", "crown-ibp", "--arch", "cnn_small", "--width", "4",
                  script=hydra_prune)
    model = common.load_model(tmp_path / "run/model.pt").double()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 1, 8, 8, generator=generator).double(), torch.arange(6)
    x = 0.5 + 0.02 * x                                           # of low contrast
    together, layers = all_bounds(model, x, y, 0.05)["cheap"], hydra_prune.plain_layers(model)
    mixed = torch.cat([x, torch.rand(3, 1, 8, 8).double().round()])
    for other in (torch.cat([all_bounds(model, x[i:i + 1], y[i:i + 1], 0.05)["cheap"] for i in range(6)]),
                  all_bounds(model, mixed, torch.arange(9), 0.05)["cheap"][:6]):
        assert torch.allclose(together, other, atol=1e-12)
    boxes = hydra_prune.interval_boxes(layers, x, 0.6)
    assert boxes[0][0].min() == 0 and boxes[0][1].max() == 1     # of the pixels, not of the batch
    dense = common.build_network("cnn_small", 4, 1, 10, (8, 8)).double()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(all_bounds(dense, x, y, 0.05)["cheap"], together)
    assert result["verified_ci"][0] <= result["verified_acc"] <= result["verified_ci"][1]


def test_hydra_bounds_of_unknown_layers_are_refused():
    for odd in (nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(3, 3, 3, padding="same"),
                nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")):
        with pytest.raises(common.Fault, match="no bounds are known"):
            hydra_prune.plain_layers(nn.Sequential(odd, nn.Flatten(), nn.Linear(12, 2)))
    with pytest.raises(common.Fault, match="does not end"):
        hydra_prune.plain_layers(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert hydra_prune.verify(resnet(), None, 0.1, None) == {}


@pytest.fixture(scope="session")
def pgd_trained(digits):
    """cnn_small trained by PGD at epsilon 0.04, and which test images an attack leaves right."""
    args = hydra_prune.get_args("--dataset digits --arch cnn_small --width 16 --epsilon 0.04 --num-steps 5 "
                                "--step-size 0.01 --device cpu --amp off".split())
    model, generator = common.build_network(**common.network_of(args, digits)), torch.Generator()
    optimizer, schedule = hydra_prune.optimizer_of(model, args.lr, 10, digits, args)
    for _ in range(10):
        batches = digits.batches(args.batch_size, generator)
        hydra_prune.train_epoch(model, batches, optimizer, schedule, args)
    with common.evaluating(model) as generator:
        first = common.first_broken_iterate(model, digits.test, generator, epsilon=0.04, step_size=0.01,
                                            num_steps=10)
    return model, first > 10


def test_hydra_symbolic_bound_verifies_what_pgd_trained_and_gets_only_what_is_open(pgd_trained, digits,
                                                                                   monkeypatch):
    model, robust = pgd_trained
    result, seen, symbolic = {}, [], hydra_prune.symbolic_margins

    def spy(layers, boxes, y):
        seen.append(boxes[0][0])
        return symbolic(layers, boxes, y)
    for bound in (spy, lambda layers, boxes, y: torch.zeros(len(y), 10)):
        monkeypatch.setattr(hydra_prune, "symbolic_margins", bound)
        result[bound] = hydra_prune.verify(model, digits.test, 0.04, robust)["verified_acc"]
    assert result[spy] > 70 and result[bound] < 30 and result[spy] <= common.per_cent(robust)
    monkeypatch.undo()
    x, y = common.to_float(digits.test[0]).double(), digits.test[1]
    bounds = all_bounds(copy.deepcopy(model).double(), x, y, 0.04)
    cheap, four = ((lower.scatter(1, y[:, None], 1.0) > 0).all(1) for lower in (
        bounds["cheap"], torch.maximum(bounds["cheap"], bounds["symbolic"])))
    assert torch.equal(torch.cat(seen), (x - 0.04).clamp(min=0)[robust & ~cheap]) and max(map(len, seen)) <= 8
    assert result[spy] == common.per_cent(four) and result[bound] == common.per_cent(cheap)
    assert not (four & ~robust).any() and (~robust & ~cheap).any() and cheap.any()


@pytest.mark.parametrize("name", ["cheap_margins", "symbolic_margins"])
def test_hydra_a_bound_that_is_wrong_or_breaks_is_noticed_and_leaves_the_network_as_it_was(
        digits, monkeypatch, name):
    torch.manual_seed(0)
    model = common.build_network("cnn_small", 4, 1, 10, (8, 8))
    images = [t[:120] for t in digits.test]

    def judge(model, robust):
        return hydra_prune.verify(model, images, 0.01, robust)
    said = common.evaluate(model, images, **SETTINGS | {"epsilon": 0.01}, extra_metrics=judge)
    assert 0 < said["verified_acc"] <= said["robust_acc"] < 100

    def broken(layers, boxes, y):
        raise MemoryError
    wrong = dict(cheap_margins=lambda layers, boxes, y: torch.ones(len(y), 10)).get(name, broken)
    monkeypatch.setattr(hydra_prune, name, wrong)
    model[2].train(), model[3].eval()
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises((common.Fault, MemoryError), match="not sound" if name == "cheap_margins" else None):
        judge(model, torch.arange(120) % 3 > 0)
    assert modes == [m.training for m in model.modules()]
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())
    monkeypatch.undo()                                           # a margin of exactly 0 proves nothing
    flat = linear(torch.zeros(10, 64))
    assert hydra_prune.verify(flat, images, 0.01, torch.ones(120) == 1)["verified_acc"] == 0


def test_hydra_mixtrain_loss_is_its_formula_and_reaches_the_scores():
    model, x, y = chain(1)
    flags = "--dataset digits --objective mixtrain --mix-images 7 --device cpu"
    args, coins = hydra_prune.get_args(flags.split()), []
    assert (args.epsilon, args.step_size, args.arch, args.amp) == (0.02, 0.005, "cnn_small", False)
    for seed in range(60):
        torch.manual_seed(seed)
        loss, logits = hydra_prune.objective(model, x, y, args, 0.5, 3.0)
        torch.manual_seed(seed)
        coins.append(bool(torch.rand(()) < 0.8))
        some = torch.randint(4, (7,))
        wanted = F.cross_entropy(model(x), y)
        if coins[-1]:
            wanted = wanted + 3 * F.cross_entropy(-forward_symbols(model, x[some], y[some], 0.01), y[some])
        assert torch.allclose(loss, wanted) and torch.equal(logits, model(x))
    assert 0.7 < sum(coins) / 60 < 0.9
    parameters = list(model.parameters())
    for found, sought in zip(*(torch.autograd.grad(of, parameters) for of in (loss, wanted))):
        assert torch.allclose(found, sought) and found.any()
    for arch, images in (("cnn_small", 5), ("cnn_large", 1)):
        flags = f"--dataset digits --objective mixtrain --device cpu --arch {arch}"
        assert hydra_prune.get_args(flags.split()).mix_images == images


def test_hydra_weight_of_mixtrain_and_scores_without_weight_decay(tmp_path, monkeypatch):
    """The weight begins anew in each phase and grows at the full radius; batch norms keep their decay."""
    optimizers, epochs, weights = [], [], []
    optimizer_of, train_epoch = hydra_prune.optimizer_of, hydra_prune.train_epoch

    def spy(model, batches, optimizer, *rest, **more):
        epochs.append(more["epochs"])
        optimizers.append(optimizer)
        return train_epoch(model, batches, optimizer, *rest, **more)
    monkeypatch.setattr(hydra_prune, "train_epoch", spy)
    unevaluated(monkeypatch)
    tiny(tmp_path / "run", "--objective", "natural", "--ramp-epochs", "1", script=hydra_prune)
    assert epochs == [-1, 0, 0, 1, 0, 1]
    args = hydra_prune.get_args("--dataset digits --objective mixtrain --device cpu".split())
    monkeypatch.setattr(hydra_prune, "objective", lambda model, x, y, args, strength, w: (
        weights.append(w), (model(x).sum(), model(x)))[1])
    model, x, y = chain(0)
    for epoch in (-30, 0, 4, 5, 10, 34, 35, 9999):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        said = train_epoch(model, [(x, y)], optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), args,
                           epochs=epoch)
        assert said["w"] == weights[-1]
    assert weights == pytest.approx([0.1, 0.1, 0.1, 0.25, 0.625, 0.1 * 2.5**6, 50, 50])
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in resnet().modules())
    groups = [[(len(g["params"]), g["weight_decay"]) for g in o.param_groups] for o in optimizers[::2]]
    assert groups[1] == [(2 * norms, 5e-4), (len(hydra_prune.Scores(resnet(), "irregular", 2).s), 0)]
    assert all(g[0][1] == 5e-4 and g[1][0] == 0 for g in (groups[0], groups[2]))
    for objective, kind in (("pgd", torch.optim.SGD), ("mixtrain", torch.optim.Adam)):
        args = hydra_prune.get_args(["--dataset", "digits", "--objective", objective, "--device", "cpu"])
        model, data = resnet(), common.Data((x, y), (x, y), [])
        scores, norm = hydra_prune.Scores(model, "irregular", 2), model.bn1
        before = [p.detach().clone() for p in (*scores.s, norm.weight)]
        optimizer, _ = optimizer_of(norm, 1.0, 5, data, args, scores.s)
        for p in (*scores.s, *norm.parameters()):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert type(optimizer) is kind and not torch.equal(before.pop(), norm.weight)
        assert all(map(torch.equal, before, scores.s))


def test_hydra_crown_ibp_loss_mixes_both_bounds_and_reaches_the_scores():
    model, x, y = chain(0)
    flags = "--dataset digits --objective crown-ibp --final-share 0.25 --device cpu"
    args = hydra_prune.get_args(flags.split())
    assert args.epsilon == 0.02 and args.arch == "cnn_small" and not args.amp
    for strength, share in ((0.0, 1.0), (0.5, 0.625), (1.0, 0.25)):
        loss, logits = hydra_prune.objective(model, x, y, args, strength)
        bounds = all_bounds(model, x, y, 0.02 * strength)
        mixed = share * bounds["crown"] + (1 - share) * bounds["ibp"]
        assert torch.allclose(logits, -mixed) and torch.allclose(loss, F.cross_entropy(-mixed, y))
    with torch.no_grad():
        worst = margins(model, (x + 0.02 * torch.randn_like(x).sign()).clamp(0, 1), y)
    assert F.cross_entropy(-worst, y) <= loss
    scores = hydra_prune.Scores(model, "irregular", 2)
    scores.mask_weights_()
    hydra_prune.objective(model, x, y, args, 0.5)[0].backward()
    scores.collect_gradients_()
    assert all(s.grad.abs().sum() > 0 for s in scores.s)


# ---------------------------------------------------------------- HYDRA: smoothing
def test_smoothing_clopper_pearson_equals_scipy():
    beta = pytest.importorskip("scipy.stats").beta
    for n, alpha in ((10, 0.05), (100, 0.001), (10000, 0.001), (100000, 0.01)):
        for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):
            theirs = beta.ppf(alpha, count, n - count + 1) if count else 0.0
            assert judges.clopper_pearson(count, n, alpha) == pytest.approx(theirs, abs=1e-9)


def test_smoothing_certified_radius_of_a_linear_classifier_is_below_the_true_distance():
    w, drawn = torch.zeros(2, 4), []
    w[1, 0] = 1.0
    model = linear(w)
    model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0]))
    model[1].bias.data = torch.tensor([-0.1, 0.0])               # class 1 where x_0 > -0.1, beyond the pixels
    image = torch.tensor([0.2, 0.1, 0.2, 0.9]).view(1, 2, 2)     # at distance 0.3
    label, r = judges.certify(model, image, torch.Generator().manual_seed(0), sigma=0.25, draws=20000,
                              classes=2)
    assert label == 1 and 0.27 < r < 0.3
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 100 + 20000     # the bound has draws of its own
    for x, wanted in ((-0.1, (None, 0.0)), (9.0, (1, 0.25 * NormalDist().inv_cdf(0.001 ** (1 / 2000))))):
        image[0, 0, 0] = x                                       # on the plane: it must abstain; far from it
        found = judges.certify(model, image, torch.Generator().manual_seed(0), sigma=0.25, draws=2000, classes=2)
        assert found == (wanted[0], pytest.approx(wanted[1]))


def test_smoothing_curve_falls_and_counts_what_abstains_as_wrong(robust, digits):
    found = judges.smoothing_curve(robust, digits.test, sigma=0.25, count=20, draws=200)
    curve = list(found["curve"].values())
    assert curve == sorted(curve, reverse=True) and found["images"] == 20 and len(curve) > 3
    assert curve[0] <= 100 - 100 * found["abstained"] / 20
    ceiling = 0.25 * NormalDist().inv_cdf(0.001 ** (1 / 200))
    assert float(list(found["curve"])[-1]) <= ceiling


# ---------------------------------------------------------------- Binary-Relax
BITS = (1, 2, 4)
GOLDEN = torch.tensor([0.9, -0.5, 0.1, -0.05, 0.3, 1.4, -0.2, 0.02], dtype=torch.float64)


def quantised(v, bits):
    codes, scale = binary_relax.project(v, bits)
    return scale * codes


def nearest(v, bits):
    """The least ||v - s c||^2 over all codes c and scales s >= 0, by trying all codes."""
    most = 2 ** (bits - 1) - 1
    levels = (-1, 1) if bits == 1 else range(-most, most + 1)
    c = torch.tensor(list(itertools.product(levels, repeat=len(v))), dtype=v.dtype)
    gain = (c @ v).clamp(min=0).square() / c.square().sum(1).clamp(min=1)
    return v.square().sum() - gain.max()


@pytest.mark.parametrize("bits, scale, codes, error", [
    (1, 0.43375, [1, -1, 1, -1, 1, 1, -1, 1], 1.6577875),
    (2, 0.9333333, [1, -1, 0, 0, 0, 1, 0, 0], 0.5495667),
    (4, 0.1876404, [5, -3, 1, 0, 2, 7, -1, 0], 0.0293045)])
def test_relax_projection_of_the_golden_vector(bits, scale, codes, error):
    found, s = binary_relax.project(GOLDEN, bits)
    assert found.tolist() == codes and abs(s - scale) < 1e-7
    assert abs((GOLDEN - s * found).square().sum() - error) < 1e-7


@pytest.mark.parametrize("bits, length", [(1, 8), (2, 7), (4, 4)])
def test_relax_projection_is_the_nearest_or_between_it_and_nothing(bits, length):
    worst = 0
    for seed in range(50):
        v = conv_weight(length, seed=seed)
        best, found = nearest(v, bits), (v - quantised(v, bits)).square().sum()
        assert best - 1e-12 <= found <= v.square().sum()
        worst = max(worst, found - best)
    assert (worst < 1e-12) == (bits == 1)                        # the others are rules, not the minimum


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(5))
def test_relax_projection_is_orthogonal_idempotent_and_equivariant(bits, seed):
    v = conv_weight(6, 5, 3, 3, seed=seed).abs().pow(1 + seed / 2) * conv_weight(6, 5, 3, 3, seed=seed).sign()
    q, order = quantised(v, bits), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert abs(((v - q) * q).sum()) < 1e-10 * v.square().sum()
    for found, wanted in ((quantised(q, bits), q), (quantised(1e5 * v, bits), 1e5 * q),
                          (quantised(-v, bits), -q), (quantised(v[order], bits), q[order])):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    for lam in (0.1, 1.0, 10.0, 350.0):                          # the relaxed point has the same projection
        w = binary_relax.relax(v, bits, lam)
        assert torch.allclose((w - q).norm() * (1 + lam), (v - q).norm())
        assert torch.allclose((w - v).norm() * (1 + lam), lam * (v - q).norm())
        found = binary_relax.project(w, bits)
        assert torch.equal(found[0], binary_relax.project(v, bits)[0])
        assert torch.allclose(found[1] * found[0], q)
    assert torch.equal(binary_relax.relax(v, bits, 0), v) and torch.equal(
        binary_relax.relax(v, bits, math.inf), q)


def test_relax_projection_of_zeros_ties_and_single_weights():
    for bits in BITS:
        codes, scale = binary_relax.project(torch.zeros(3, 2), bits)
        assert scale == 0 and (codes == (1 if bits == 1 else 0)).all()
        assert torch.allclose(quantised(torch.tensor([-3.0]), bits), torch.tensor([-3.0]))
        assert torch.allclose(quantised(torch.full((4, 3), 0.2), bits), torch.tensor(0.2))
    assert binary_relax.project(torch.tensor([0.0, -0.0, -1.0]), 1)[0].tolist() == [1, 1, -1]
    v = torch.tensor([0.5, 0.51, 1.5, -1.51, 6.5, 7.5])          # s0 = 2 * 7.5 / 15 = 1
    assert binary_relax.project(v, 4)[0].tolist() == [0, 1, 1, -2, 6, 7]
    assert binary_relax.project(torch.tensor([7.0, 3.0]), 2)[0].tolist() == [1, 0]
    assert binary_relax.project(torch.tensor([7.0, 3.77]), 2)[0].tolist() == [1, 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("theta", [0.25, 0.5, 0.9375])
def test_relax_agrees_with_torchao(bits, theta):
    parq = pytest.importorskip("torchao.prototype.parq.optim")
    v = conv_weight(4, 3, 3, 3).float()
    codes, scale = binary_relax.project(v, bits)
    levels = scale * torch.arange(-7.0, 8) if bits == 4 else scale * torch.arange(-1.0, 2, 3 - bits)
    theirs, done = v.clone(), v.clone()
    prox = parq.ProxBinaryRelax(anneal_start=0, anneal_end=16)
    prox.apply_(theirs, None if bits == 1 else scale * codes, levels, int(16 * theta))
    assert torch.allclose(binary_relax.relax(v, bits, theta / (1 - theta)), theirs, atol=1e-6)
    prox.apply_(done, None if bits == 1 else scale * codes, levels, 16)
    assert torch.allclose(binary_relax.relax(v, bits, math.inf), done)


@pytest.mark.parametrize("bits", BITS)
def test_relax_gives_the_latent_weights_back_bit_for_bit_also_after_an_exception(bits):
    model = resnet()
    weights = list(binary_relax.quantisable(model).values())
    before, grown = copy.deepcopy(model.state_dict()), [w.data_ptr() for w in weights]
    with pytest.raises(Stop), binary_relax.relaxed(weights, bits, math.inf):
        assert all(len(w.unique()) <= {1: 2, 2: 3, 4: 15}[bits] for w in weights)
        assert not torch.equal(weights[0], before["conv1.weight"])
        raise Stop
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert grown == [w.data_ptr() for w in weights]              # the parameters that the optimizer holds


@pytest.mark.parametrize("adv, nat", [(2, 0), (0, 2)])
def test_relax_step_moves_the_latent_weights_by_the_gradient_at_the_relaxed_ones(digits, adv, nat):
    """One step of SGD with weight decay, by hand; the classifier's and batch norm's are plain."""
    args = binary_relax.get_args("--dataset digits --device cpu --amp off --num-steps 3 --bits 2 "
                                 f"--adv-weight {adv} --nat-weight {nat}".split())
    torch.manual_seed(0)
    model = binary_relax.EnResNet(8, 1, 0.0, 2, 1, 10)
    targets, lam = binary_relax.quantisable(model), 1.5
    twin, (x, y) = copy.deepcopy(model), next(digits.batches(16, torch.Generator().manual_seed(1)))
    v = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in twin.named_parameters():
        if name in targets:
            q = quantised(p.data, 2)
            p.data = (lam * q + p.data) / (lam + 1)
    torch.manual_seed(3)
    seen = common.pgd(twin.eval(), x, y, args.epsilon, args.step_size, 3) if adv else x
    (2 * F.cross_entropy(twin.train()(seen), y)).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    torch.manual_seed(3)
    logged = binary_relax.train_epoch(model, [(x, y)], optimizer, schedule, args, list(targets.values()), lam)
    assert set(logged) == {"loss", "train_robust_acc" if adv else "train_clean_acc"}
    for (name, p), other in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(p, v[name] - 0.1 * (other.grad + 0.01 * v[name]), atol=1e-6), name


def test_relax_loss_weighs_both_images_and_attacks_only_where_asked(digits, monkeypatch):
    batch, calls = next(digits.batches(16, torch.Generator().manual_seed(1))), []
    found = {}
    for adv, nat in ((1, 0), (0, 1), (8, 1), ("8/9", "1/9")):
        args = binary_relax.get_args(f"--dataset digits --device cpu --amp off --adv-weight {adv} "
                                     f"--nat-weight {nat}".split())
        monkeypatch.setattr(binary_relax, "pgd", lambda *a: calls.append(a) or common.pgd(*a))
        torch.manual_seed(0)
        model = binary_relax.EnResNet(8, 1, 0.0, 2, 1, 10)
        before, images = copy.deepcopy(model).train(), []
        model.register_forward_pre_hook(
            lambda m, inputs, seen=images: seen.append(inputs[0].clone()) if m.training else None)
        optimizer, schedule = common.make_optimizer(model, 1e-8, 1, digits, args)
        logged = binary_relax.train_epoch(model, [batch], optimizer, schedule, args)
        losses = [F.cross_entropy(before(x), batch[1]).item() for x in images]
        wanted = [w for w in (args.adv_weight, args.nat_weight) if w]
        assert abs(logged["loss"] - sum(w * one for w, one in zip(wanted, losses))) < 1e-4
        if nat != 0:
            assert torch.equal(images[-1], batch[0])
        if adv != 0:
            assert 0.19 < (images[0] - batch[0]).abs().max() <= 0.2 + 1e-6
        found[adv] = logged["loss"]
    assert len(calls) == 3 and abs(found[8] - 9 * found["8/9"]) < 1e-3


@pytest.mark.parametrize("depth, quantised, total, tensors, channels", [
    (20, 267696, 272282, 19, 627), (44, 654768, 661146, 43, 1523), (56, 848304, 855578, 55, 1971),
    (110, 1719216, 1730522, 109, 3987)])
def test_enresnet_has_the_published_parameter_counts(depth, quantised, total, tensors, channels):
    with torch.device("meta"):
        model = binary_relax.EnResNet(depth, 2, 0.1, 16, 3, 10)
    targets = binary_relax.quantisable(model)
    assert sum(p.numel() for p in model.parameters()) == 2 * total and len(targets) == 2 * tensors
    assert sum(w.numel() for w in targets.values()) == 2 * quantised
    assert sum(w.shape[1] for w in targets.values()) == 2 * channels


def ensemble(noise, members=2, width=2, size=12):
    """An EnResNet in float64 whose batch norms are not neutral, and images for it."""
    more = dict(depth=8, members=members, noise=noise)
    network = dict(arch="enresnet", width=width, channels=3, classes=10, size=[size, size], **more)
    return shaken("enresnet", width, 3, size, **more).eval(), network, torch.rand(5, 3, size, size).double()


def test_enresnet_without_noise_is_the_mean_of_its_members_image_by_image():
    model, _, x = ensemble(noise=0.0)
    a, b = model.members
    assert torch.allclose(model(x), (a(x) + b(x)) / 2) and not torch.allclose(a(x), b(x))
    assert torch.allclose(torch.cat([model(image[None]) for image in x]), model(x), rtol=0, atol=1e-12)
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}
    wide = binary_relax.EnResNet(8, 1, 0.0, 16, 3, 10).members[0].blocks[1].conv1.weight   # 16 -> 32
    assert abs(wide.std() / math.sqrt(2 / (9 * 32)) - 1) < 0.05
    h, stages = a.conv1(x), [a.blocks[i].conv1.stride[0] for i in range(3)]
    assert stages == [1, 2, 2] and [block.shortcut is None for block in a.blocks] == [True, False, False]
    for block in a.blocks:                                       # pre-activation, written out
        r = F.relu(block.bn1(h))
        h = block.conv2(F.relu(block.bn2(block.conv1(r)))) + (block.shortcut(r) if block.shortcut else h)
    assert torch.allclose(a.fc(F.relu(a.bn(h)).mean((2, 3))), a(x))


def test_enresnet_noise_is_relative_seeded_and_of_each_image_alone():
    h = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5.0, 0.0, 2.0]).view(-1, 1, 1, 1) + 3
    torch.manual_seed(1)
    added = binary_relax.add_noise(h, 0.3) - h
    assert torch.allclose(added.flatten(1).std(1), 0.3 * h.flatten(1).std(1), rtol=0.05, atol=1e-5)
    torch.manual_seed(1)
    assert torch.equal(binary_relax.add_noise(h, 0.3) - h, added)
    changed = h.clone()
    changed[0] *= 100
    torch.manual_seed(1)                                         # a neighbour changes nothing
    assert torch.allclose((binary_relax.add_noise(changed, 0.3) - changed)[1:], added[1:], atol=1e-5)
    leaf = h[[0, 1]].double().requires_grad_()
    torch.manual_seed(1)
    noise = torch.randn(2, 32, 32, 8).permute(0, 3, 1, 2).double()
    plain = leaf + 0.3 * leaf.flatten(1).std(1).view(2, 1, 1, 1) * noise
    torch.manual_seed(1)
    found = binary_relax.add_noise(leaf, 0.3)
    gradients = [torch.autograd.grad(out.square().sum(), leaf)[0] for out in (found, plain)]
    assert torch.allclose(found, plain) and torch.allclose(*gradients)
    leaf = torch.zeros(2, 1, 4, 4, requires_grad=True)           # no spread: no noise, and a finite gradient
    binary_relax.add_noise(leaf, 0.3).sum().backward()
    assert leaf.grad.isfinite().all()
    for training in (False, True):
        model, _, x = ensemble(noise=0.1)
        model.train(training)
        assert not torch.allclose(model(x), model(x))            # on in training and in evaluation
    assert all(block.noise == 0.1 for member in model.members for block in member.blocks)


def test_sanity_flags_of_an_honest_network_with_noise_are_one(robust, digits):
    noisy = Wrapped(robust, lambda f, x: f(x + 0.1 * torch.randn_like(x))).eval()
    flags = common.sanity_flags(noisy, digits.test, epsilon=0.001, step_size=0.0005, num_steps=3, eot=2)
    assert len(flags) == 1 and flags[0].startswith("random output")
    images = [t[:60] for t in digits.test]                       # judged by the mean of draws, not by one
    assert judges.transfer(noisy, noisy, images, epsilon=0.2, step_size=0.05, num_steps=3, eot=2) * 0.6 % 1


def test_enresnet_evaluation_repeats_and_is_flagged_as_random_alone(digits, whole):
    folder, result = whole(binary_relax, "--noise", "0.1", "--eot", "2")
    model, images = common.load_model(folder / "model.pt"), [t[:60] for t in digits.test]
    settings = dict(epsilon=0.2, step_size=0.05, num_steps=3, eot=2)
    assert common.evaluate(model, images, **settings) == common.evaluate(model, images, **settings)
    flags = result["flags"]
    assert result["robust_acc"] <= result["clean_acc"]
    assert result["attack"]["eot"] == 2 and len(flags) == 1 and flags[0].startswith("random output")
    assert {name: a["eot"] for name, a in result["attacks"].items()} == dict(fgsm=1, ifgsm=1, margin=2)


def test_sparsity_counts_zeros_and_dead_input_channels_pooled():
    a, b = torch.ones(2, 4, 3, 3), torch.ones(4, 2, 1, 1)
    a[:, 1] = 0
    a[0, 2] = 0
    b[3] = 0                                                     # a filter, no input channel
    assert binary_relax.sparsity([a]) == dict(sparsity=37.5, channel_sparsity=25.0)
    assert binary_relax.sparsity([a, b]) == dict(sparsity=36.25, channel_sparsity=16.667)     # 29 / 80, 1 / 6
    assert binary_relax.sparsity([a, a])["channel_sparsity"] == 25


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 3, 3, 3)])
def test_packed_codes_round_trip(bits, shape):
    most = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(0)
    codes = {name: torch.randint(-most, most + 1, shape, generator=generator).float() for name in "ab"}
    codes = {name: c.sign() + (c == 0) if bits == 1 else c for name, c in codes.items()}
    packed, shapes = binary_relax.pack(codes.values(), bits), dict.fromkeys("ab", shape)
    assert packed.dtype == torch.uint8 and len(packed) == 2 * math.ceil(math.prod(shape) * bits / 8)
    found = binary_relax.unpack(packed, shapes, bits)
    assert all(torch.equal(found[name], codes[name]) for name in "ab")
    for wrong in (packed[:-1], torch.cat([packed, packed])):
        with pytest.raises(ValueError):
            binary_relax.unpack(wrong, shapes, bits)
    whole = binary_relax.encode(binary_relax.EnResNet(20, 1, 0.0, 16, 3, 10), bits)[1]["codes"]
    assert len(whole) == {1: 33462, 2: 66924, 4: 133848}[bits]


@pytest.mark.parametrize("bits", (*BITS, 32))
@pytest.mark.parametrize("arch, channels, size", [
    ("enresnet", 3, 12), ("resnet18", 3, 16), ("vgg16", 3, 32), ("wrn28_4", 2, 8), ("lenet", 1, 12),
    ("cnn_small", 1, 8)])
def test_network_without_dead_channels_equals_the_quantised_one(arch, channels, size, bits):
    if arch == "enresnet":
        model, network, _ = ensemble(noise=0.1)
    else:
        model = shaken(arch, 2, channels, size).eval()
        network = dict(arch=arch, width=2, channels=channels, classes=10, size=[size, size])
    targets = binary_relax.quantisable(model)
    for name, w in targets.items():
        if "conv2" in name or arch not in ("enresnet", "resnet18", "wrn28_4"):
            w.data[:, ::3] *= 1e-6
    state, codes, found = binary_relax.encode(model, bits)
    small = binary_relax.build(dict(network=network, state=copy.deepcopy(state), **codes)).double().eval()
    for name, w in targets.items() if bits < 32 else ():
        w.data = quantised(w.data, bits)
    x, outs = torch.rand(3, channels, size, size, dtype=torch.float64), []
    for m in (model, small):
        torch.manual_seed(2)
        outs.append(m(x))
    assert torch.allclose(outs[0], outs[1], rtol=0, atol=1e-5 * outs[0].abs().max().item())
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    dead = bits in (2, 4)
    assert (counts[0] < counts[1]) == dead and (found["channel_sparsity"] > 0) == dead


def test_a_channel_that_only_removed_filters_read_goes_too_and_one_always_stays():
    network = dict(arch="vgg16", width=1, channels=3, classes=10, size=[32, 32])
    model = common.build_network(**network)
    for w in binary_relax.quantisable(model).values():
        w.data.fill_(1)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    convs[2].weight.data[:, 0] = 0                               # nothing reads filter 0 of the one before,
    convs[1].weight.data[1:, 1] = 0                              # which alone reads filter 1 of the first
    state, codes, _ = binary_relax.encode(model, 2)
    small = binary_relax.build(dict(network=network, state=state, **codes))
    assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)][:3] == [3, 3, 8]
    convs[3].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(common.Fault, match="not finite"):
        binary_relax.encode(model, 2)
    model, network, x = ensemble(noise=0.0)
    model.members[0].blocks[1].conv2.weight.data.zero_()
    state, codes, _ = binary_relax.encode(model, 2)
    small = binary_relax.build(dict(network=network, state=state, **codes)).eval()
    assert small.members[0].blocks[1].conv1.out_channels == 1 and small(x.float()).isfinite().all()


@pytest.mark.parametrize("bits", (*BITS, 32))
def test_relax_run_writes_a_smaller_file_of_few_values(whole, tmp_path, bits):
    folder, result = whole(binary_relax, "--bits", str(bits))
    state, most = weights_of(folder / "model.pt"), {1: 2, 2: 3, 4: 15, 32: math.inf}[bits]
    model = common.load_model(folder / "model.pt")
    for name in binary_relax.quantisable(model):
        levels = state[name].unique()
        assert len(levels) <= most
        if bits < 32:
            least = levels[levels > 0].min()
            steps = levels / state[name].abs().max() * (2**(bits - 1) - 1 if bits > 1 else 1)
            assert least > 0 and torch.allclose(steps, steps.round(), atol=1e-3)
    zero = sum(int((state[n] == 0).sum()) for n in binary_relax.quantisable(model))
    count = sum(state[n].numel() for n in binary_relax.quantisable(model))
    assert result["flags"] == [] and (result["sparsity"] > 5) == (bits in (2, 4))
    if result["channel_sparsity"] == 0:
        assert abs(result["sparsity"] - 100 * zero / count) < 0.01
    assert result["fgsm_acc"] <= result["clean_acc"]
    assert {k: (a["losses"], a["num_steps"], a["random_start"]) for k, a in result["attacks"].items()} == dict(
        fgsm=(["ce"], 1, False), ifgsm=(["ce"], 20, False), margin=(["margin"], 20, False))
    assert result["args"]["relax_lr"] == result["args"]["lr"] / 2
    assert result["bytes"] == os.path.getsize(folder / "model.pt")
    assert (result["bytes"] < result["dense_bytes"]) == (bits < 32)
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    lam = [line.get("lam") for line in lines if line.get("phase") == "relax"]
    assert lam == ([1, 350**0.5] if bits < 32 else [None, None])
    assert phases_of(folder, "relax") == [2, 2, 2]


def test_relax_method_bc_is_br_that_switches_at_once(whole, tmp_path, monkeypatch):
    br = whole(binary_relax)[0]
    unevaluated(monkeypatch)
    tiny(tmp_path / "bc", "--method", "bc", script=binary_relax)
    tiny(tmp_path / "run", "--relax-epochs", "0", "--finetune-epochs", "4", script=binary_relax)
    assert same_weights(tmp_path / "bc/model.pt", tmp_path / "run/model.pt")
    assert not same_weights(br / "model.pt", tmp_path / "run/model.pt")


def test_relax_quantises_the_networks_of_common_from_a_dense_one(whole, finished, tmp_path):
    more = "--depth 8 --members 2 --pretrain-epochs 0".split()
    with pytest.raises(SystemExit):
        tiny(tmp_path / "run", "--arch", "resnet18", *more, script=binary_relax)
    flags = ("--dataset digits --arch resnet18 --width 1 --train-images 128 --eval-images 40 --batch-size 32 "
             "--relax-epochs 1 --finetune-epochs 1 --num-steps 1 --eval-steps 2 --restarts 1 --device cpu")
    dense = finished[0] / "dense.pt"
    flags = [*flags.split(), "--pretrained", str(dense)]
    result = binary_relax.main([*flags, "--output", str(tmp_path / "run")])
    assert result["flags"] == [] and same_weights(dense, tmp_path / "run/dense.pt")
    kept = weights_of(tmp_path / "run/model.pt")
    assert len(kept["layer1.0.conv1.weight"].unique()) <= 3 < len(kept["layer2.0.shortcut.0.weight"].unique())
    own = whole(binary_relax)[0] / "dense.pt"
    again = ["--dataset", "digits", "--device", "cpu", "--width", "1", "--output", str(tmp_path / "again"),
             "--relax-epochs", "1", "--finetune-epochs", "0", "--train-images", "128", "--eval-images", "40",
             "--num-steps", "1", "--eval-steps", "1", "--noise", "0"]
    binary_relax.main([*again, "--depth", "8", "--pretrained", str(own)])
    assert same_weights(own, tmp_path / "again/dense.pt")
    for file, depth in ((own, 14), (dense, 8), (own.with_name("model.pt"), 8)):
        with pytest.raises(common.UsageFault, match="--pretrained"):
            binary_relax.main([*again, "--depth", str(depth), "--pretrained", str(file), "--output",
                               str(tmp_path / "refused")])


# ---------------------------------------------------------------- runs end to end
def test_cstar_run_writes_a_smaller_file_that_is_what_it_reports(finished, digits):
    folder, result = finished
    artifact = common.read_model(folder / "model.pt")[0]
    model = common.load_model(folder / "model.pt")
    count = sum(p.numel() for p in model.parameters())
    dense = common.load_model(folder / "dense.pt")
    assert result["parameters"] == count <= sum(p.numel() for p in dense.parameters()) / 4
    sizes = [os.path.getsize(folder / name) for name in ("model.pt", "dense.pt")]
    assert result["bytes"] == sizes[0] < result["dense_bytes"] == sizes[1]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    images = [t[common.balanced(digits.test[1].numpy(), 40)] for t in digits.test]
    again = common.evaluate(model, images, epsilon=0.2, step_size=0.05, num_steps=3, restarts=1)
    assert {k: result[k] for k in again} == again
    cstar.build(artifact).load_state_dict(artifact["state"], strict=True)
    phases = [line.get("phase") for line in map(json.loads, open(folder / "log.jsonl"))]
    assert [phases.count(p) for p in ("pretrain", "admm", "finetune")] == [2, 2, 2] and phases[-1] == "final"
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)


class Stop(Exception):
    pass


RESUMED = [*itertools.product(SCRIPTS, [""], range(1, 10)), *itertools.product(
    [hydra_prune], ["--objective mixtrain --arch cnn_small --mix-images 2"], (2, 5, 8))]


@pytest.mark.parametrize("script, more, saves", RESUMED)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(whole, tmp_path, monkeypatch, script, more, saves):
    """Stopped right after the n-th checkpoint: before, within and at the end of each of the three phases."""
    more = {admm_prune: "--rho-growth 2", binary_relax: "--noise 0.1"}.get(script, more).split()
    finished, save, count = whole(script, *more), common.Run.save, itertools.count(1)

    def stopping(run, *args):
        save(run, *args)
        if next(count) == saves:
            raise Stop
    monkeypatch.setattr(common.Run, "save", stopping)
    with pytest.raises(Stop):
        tiny(tmp_path / "run", *more, script=script)
    monkeypatch.undo()
    torch.manual_seed(12345)                                     # whatever came between
    if script is not cstar:                                      # one script is enough for the evaluation
        unevaluated(monkeypatch)
    tiny(tmp_path / "run", *more, "--resume", script=script)
    assert same_weights(finished[0] / "model.pt", tmp_path / "run/model.pt")
    assert same_weights(finished[0] / "dense.pt", tmp_path / "run/dense.pt")
    lines = [[{k: v for k, v in json.loads(line).items() if k not in ("seconds", "output")}
              for line in open(f / "log.jsonl")] for f in (finished[0], tmp_path / "run")]
    assert lines[1] == lines[0][:None if script is cstar else -1]


def test_resume_of_a_finished_run_prints_its_result_or_evaluates_otherwise_and_refuses_other_runs(finished, tmp_path):
    folder, before = finished
    assert tiny(folder, "--resume") == json.loads(json.dumps(before))
    for more, words in (((), "finished"), (("--seed", "1"), "different run.*seed"),
                        (("--rho", "0.5"), "different run.*rho")):
        with pytest.raises(common.UsageFault, match=words):
            tiny(folder, *more)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()                       # as if it had been stopped just before
    result = tiny(tmp_path / "run", "--restarts", "3", "--resume")
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert result["attack"]["restarts"] == result["args"]["restarts"] == 3 and lines[-2]["restarts"] == 3
    assert result["clean_acc"] == before["clean_acc"]
    assert same_weights(folder / "model.pt", tmp_path / "run/model.pt")


def test_pretrained_network_skips_the_first_phase_and_ratio_one_leaves_layers_dense(finished, tmp_path):
    epochs = TINY.index("--pretrain-epochs")
    flags = TINY[:epochs] + TINY[epochs + 2:]
    dense = finished[0] / "dense.pt"
    result = cstar.main([*flags, "--output", str(tmp_path / "run"), "--pretrained", str(dense), "--ratio", "1"])
    assert same_weights(dense, tmp_path / "run/dense.pt")
    assert result["dense"] == finished[1]["dense"] and result["params_ratio"] == 1
    assert set(result["ranks"].values()) == {None}


FLAGS = {                                                        # base + flag
    cstar: "--admm-epochs 0, --rank-rule uniform, --budget macs, --rho 0.1, --hooi 2, --amp "
           f"{'off' if common.bfloat16_is_fast('cpu') else 'on'}, --admm-lr 0.001, --finetune-lr 0.001, "
           "--weight-decay 0.1, --momentum 0.5, --finetune-epochs 0",
    admm_prune: "--admm-epochs 0, --rho 5, --rho-growth 2, --rho-growth 9 + --rho-max 0.9, --admm-interval 2, "
                "--group-residual, --mode post, --admm-lr 0.001, --finetune-lr 0.001, --ramp-epochs 2, "
                "--scheme column, --ratio 3, --momentum 0.5, --weight-decay 0.1",
    hydra_prune: "--scores lwm, --objective trades, --objective trades + --beta 1, --objective smooth, --ratio 3, "
                 "--objective smooth + --sigma 0.5, --scheme filter, --prune-lr 1, --finetune-lr 0.001, "
                 "--ramp-epochs 2, --prune-epochs 1, --objective natural, --arch cnn_small + --objective "
                 "crown-ibp, --objective crown-ibp --arch cnn_small + --final-share 1, --arch cnn_small + "
                 "--objective mixtrain, --objective mixtrain --arch cnn_small + --mix-images 2",
    binary_relax: "--method bc, --bits 1, --bits 4, --bits 32, --adv-weight 1, --nat-weight 0, --noise 0.1, "
                  "--members 2, --depth 14, --relax-epochs 1, --relax-lr 0.001, --ramp-epochs 5, "
                  "--momentum 0.5, --weight-decay 0.1"}


@pytest.mark.parametrize("script, flags", [(s, flags) for s in SCRIPTS for flags in FLAGS[s].split(", ")])
def test_flags_do_something(whole, tmp_path, monkeypatch, script, flags):
    base, _, more = flags.rpartition("+")
    before, run = whole(script, *base.split())[0], tmp_path / "run"
    unevaluated(monkeypatch)
    found = tiny(run, *base.split(), *more.split(), script=script)
    assert not same_weights(before / "model.pt", run / "model.pt")
    lines = [[json.loads(line) for line in open(folder / "log.jsonl")] for folder in (before, run)]
    if script is cstar:
        rho = {"--admm-epochs": None, "--rho": 0.1, "--admm-lr": 75, "--momentum": 7.5}.get(more.split()[0], 1.5)
        assert found["rho"] == (rho and pytest.approx(rho))      # 3 (1 - momentum) / (rate * 4 steps)
        residuals = [[line["residual"] for line in log if "residual" in line] for log in lines]
        assert residuals[0] != residuals[1] or "--finetune" in more
    if script is binary_relax and "--ramp" in more:              # over all three phases
        assert [line["strength"] for line in lines[1] if "strength" in line] == [0.2, 0.4, 0.6, 0.8, 1, 1]


@pytest.mark.parametrize("script", [cstar, admm_prune])
def test_admm_that_did_not_converge_is_told_by_its_smallest_residual(script, tmp_path, monkeypatch):
    def update(admm):
        admm.residuals.append([0.5, 0.2, 0.4][len(admm.residuals)])
        return admm.residuals[-1] if script is cstar else (admm.residuals[-1], 0.0)
    monkeypatch.setattr(script.ADMM, "update", update)
    unevaluated(monkeypatch)
    tiny(tmp_path / "run", *"--admm-epochs 3 --pretrain-epochs 0 --finetune-epochs 0 --num-steps 0".split(),
         script=script)
    assert "the residual grew" in (tmp_path / "run/log.jsonl").read_text()


def spawn(*command, cwd=HERE, **more):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def test_a_forked_script_in_another_folder_makes_files_of_its_own(tmp_path):
    for name in ("common.py", "cstar.py", "data/digits.npz", "tools/evaluate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / name, tmp_path / name)
    (tmp_path / "cstar.py").rename(tmp_path / "mine.py")
    run = spawn("mine.py", *TINY, "--finetune-epochs", "0", "--output", "there", cwd=tmp_path)
    assert run.wait(180) == 0, run.stderr.read()
    (tmp_path / "elsewhere").mkdir()
    command = ["../tools/evaluate.py", "../there/model.pt", "--eval-images", 40]
    judge = spawn(*command, cwd=tmp_path / "elsewhere")
    again = json.loads(judge.communicate(timeout=180)[0])
    result = json.loads((tmp_path / "there/result.json").read_text())
    assert again["script"] == result["script"] == "mine" and again["clean_acc"] == result["clean_acc"]
    assert again["robust_acc"] == result["robust_acc"] and again["attack"] == result["attack"]


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_at_once_and_says_how_to_continue(tmp_path, sent, status):
    folder = tmp_path / "\udcff"                                 # a name that no terminal can print
    folder.mkdir()
    (folder / "last.pt.123.tmp").touch()                         # of a process that was killed while it wrote
    process = spawn("cstar.py", *TINY, "--pretrain-epochs", "500", "--output", folder)
    for line in process.stdout:
        if "epoch:1 " in line:
            break
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status and errors.count("\n") == 1 and "--resume" in errors
    assert common.read_file(folder / "last.pt")["phase"] == "pretrain" and not list(folder.glob("*.tmp"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_counts_to_its_total_and_tells_the_time_that_is_left(robust, digits, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    noisy = Wrapped(robust, lambda model, x: model(x + 0.01 * torch.randn_like(x)))
    with contextlib.redirect_stderr(Terminal()) as errors:
        assert list(common.progress("abcd", "letters", 4, 7198)) == list("abcd")
        for model in (robust, noisy):
            common.evaluate(model, digits.test, epsilon=0.1, step_size=0.1, num_steps=1, eot=1)
        judges.smoothing_curve(robust, digits.test, sigma=0.25, count=3, draws=100)
        torch.manual_seed(0)
        chain = common.build_network("cnn_small", 1, 1, 10, (8, 8))
        hydra_prune.verify(chain, [t[:5] for t in digits.test], 0.1, torch.ones(5) == 1)
    lines = re.findall(r"K(\w[\w /]*): (\d+)/(\d+)(.*?)\r", errors.getvalue())
    assert (lines[1], errors.getvalue()[-4:]) == (("letters", "2", "4", ", 4:00:02 to go"), "\r\033[K")
    counts = {}
    for label, i, total, _ in lines:
        counts.setdefault(label, []).append((int(i), int(total)))
    twice = ("attack 1/2", "attack 2/2", "bounds")               # of two networks; cheap bounds, symbolic ones
    assert set(counts) == {"letters", "clean images", "certified images", *twice}
    assert all(found == [(i + 1, found[0][1]) for i in range(found[0][1])] * (1 + (label in twice))
               for label, found in counts.items())


# ---------------------------------------------------------------- wrong input
def run_cli(main, argv, monkeypatch, stderr=io.StringIO):
    """(exit status, stderr) of a script called with these arguments, and of any traceback: none is wanted."""
    errors = stderr()
    monkeypatch.setattr(sys, "argv", ["cstar.py", *argv])
    before, out = signal.getsignal(signal.SIGTERM), contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(errors), out, pytest.raises(SystemExit) as stop:
        common.cli(main)
    signal.signal(signal.SIGTERM, before)
    return stop.value.code, errors and errors.getvalue()


def test_whatever_ends_a_program_is_one_line(monkeypatch):
    def interrupted():
        for _ in common.progress(range(3), "pretrain 1/2", 3):
            raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "active", common.Run)
    status, errors = run_cli(interrupted, ["--seed", "3"], monkeypatch, Terminal)
    assert status == 130 and errors.count("\n") == 1
    assert errors.rpartition("\r\033[K")[2].startswith("cstar.py: stopped") and "--seed 3 --resume" in errors
    for main in (lambda: torch.empty(10**15), lambda: np.empty(10**15)):
        status, errors = run_cli(main, [], monkeypatch)
        assert status == 1 and errors.count("\n") == 1 and "out of memory" in errors
    assert run_cli(lambda: cstar.main(["--epsilon", "8"]), [], monkeypatch, lambda: None)[0] == 2   # `2>&-`
    assert run_cli(interrupted, [], monkeypatch, lambda: None)[0] == 130


REFUSED = {
    cstar: [("--epsilon 8", "--epsilon.*8 is not.*0 to 1.*8/255"), ("--epsilon nan", "--epsilon"),
        ("--lr inf", "--lr"), ("--lr 0", "--lr"), ("--epsilon 8/0", "--epsilon"),
        ("--batch-size 1", "--batch-size.*from 2"), ("--ratio 0.5", "--ratio"),
        ("--ratio 500", "--ratio.*500 is not from 1 to"), ("--epoch 3", "unrecognized.*--epoch"),
        ("--width 1.5", "--width"), ("--arch resnet", "--arch"), ("--device cuda:77", "--device.*cuda:77"),
        ("--device gpu", "--device.*gpu"), ("--arch vgg16", "--arch.*too deep.*8x8"),
        ("--eval-images 361", "--eval-images.*361.*360"), ("--seed -1", "--seed"),
        ("--train-images 5", "--train-images.*5 is not"), ("--pretrained nowhere.pt", "nowhere.pt"),
        ("--pretrained x.pt --pretrain-epochs 3", "--pretrain-epochs.*--pretrained"),
        ("--dataset mydata", "mydata.*--epsilon"), ("--dataset mydata --epsilon 8/255", "mydata"),
        ("--rank-rule best", "--rank-rule"),
        ("--ramp-epochs 3 --pretrained x.pt", "--ramp-epochs: 3 is more"),
        ("--admm-epochs 0 --rho 1", "--rho: does nothing"),
        ("--admm-epochs 0 --admm-lr 1", "--admm-lr: does not")],
    admm_prune: [("--target-width 2 --ratio 2", "--target-width.*--ratio"),
        ("--target-width 8", "from 1 to 4, the width"), ("--mode scratch", "scratch needs --target-width"),
        ("--mode ticket", "--ticket"), ("--mode scratch --target-width 2 --scheme column", "no --scheme"),
        ("--ticket x.pt", "--mode ticket"), ("--mode ticket --ticket nowhere.pt", "nowhere.pt"),
        ("--admm-interval 7", "7 is more than"),
        ("--mode scratch --target-width 2 --pretrained x.pt", "--pretrained.*scratch"),
        ("--group-residual --arch lenet", "--group-residual"), ("--scheme kernel", "--scheme"),
        ("--group-residual --scheme column", "--group-residual"), ("--rho-growth 0.5", "--rho-growth"),
        ("--rho 20 --rho-growth 2", "--rho-max"), ("--rho-max 2", "--rho-max: does nothing"),
        ("--mode post --rho 1", "--rho: does nothing"),
        ("--admm-epochs 0 --admm-lr 1", "--admm-lr: does nothing"),
        ("--mode ticket --ticket x.pt --finetune-lr 1", "--finetune-lr: does nothing")],
    hydra_prune: [("--objective crown-ibp --arch resnet18", "crown-ibp is for"),
        ("--objective crown-ibp --amp on", "float32"), ("--scores random", "--scores"),
        ("--objective crown-ibp --compile", "torch.compile"), ("--scheme column", "--scheme"),
        ("--final-share 2", "--final-share"), ("--ramp-epochs 99", "99 is more than the 15"),
        ("--objective mixtrain --arch resnet18", "mixtrain is for"), ("--sigma 0", "--sigma"),
        ("--objective mixtrain --amp on", "float32"), ("--objective mixtrain --compile", "torch.compile"),
        ("--objective mixtrain --momentum 0.9", "--momentum.*mixtrain.*Adam"),
        ("--mix-images 3", "--mix-images.*pgd"), ("--objective mixtrain --mix-images 0", "--mix-images.*from 1"),
        ("--objective mixtrain --beta 1", "--beta.*mixtrain"),
        ("--beta 1", "--beta: does nothing"), ("--scores lwm --prune-lr 1", "--prune-lr: does"),
        ("--prune-epochs 0 --prune-lr 1", "--prune-lr: does"),
        ("--objective crown-ibp --momentum 0.5", "--momentum: does"),
        ("--objective trades --sigma 1", "--sigma: d"),
        ("--objective smooth --final-share 1", "--final-share: does nothing")],
    binary_relax: [("--bits 3", "--bits"), ("--ratio 4", "--ratio"), ("--bits 32 --method bc", "--method"),
        ("--noise 0 --eot 3", "--eot"), ("--pretrained none.pt --ramp-epochs 3", "--ramp-epochs"),
        ("--depth 21", "--depth.*6 b"), ("--arch lenet --noise 0.1", "--noise.*enresnet"),
        ("--arch resnet18 --depth 20", "--depth"), ("--adv-weight 0 --nat-weight 0", "--nat-weight"),
        ("--adv-weight -1", "--adv-weight"), ("--members 0", "--members"), ("--noise nan", "--noise"),
        ("--pretrained none.pt", "--pretrained.*none")],
    judges: [("x.pt --smoothing-draws 200", "--smoothing-draws: does nothing"),
        ("x.pt --smoothing-images 9", "--smoothing-images: does")]}


@pytest.mark.parametrize("script, flags, words", [(s, *pair) for s, pairs in REFUSED.items() for pair in pairs])
def test_wrong_flags_are_one_line_exit_2_and_write_nothing(tmp_path, monkeypatch, script, flags, words):
    monkeypatch.chdir(tmp_path)
    status, errors = run_cli(script.main, ["--dataset", "digits", *flags.split()], monkeypatch)
    assert errors.count("\n") == 1 and re.search(words, errors), errors
    assert status == 2 and list(tmp_path.iterdir()) == []


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1:]


def test_a_flipped_bit_is_refused_or_harmless(finished, tmp_path):
    path, refused = finished[0] / "model.pt", 0
    data, state = path.read_bytes(), weights_of(path)
    for position in np.random.default_rng(0).integers(0, len(data), 100):
        (tmp_path / "flipped.pt").write_bytes(flipped(data, position))
        try:
            loaded = common.load_model(tmp_path / "flipped.pt").state_dict()
            assert all(torch.equal(loaded[k], v) for k, v in state.items())  # the bit was in padding
        except common.Fault:
            refused += 1
    assert refused > 50


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("damage", [
    lambda data: flipped(data, data.index(b"layer1")), lambda data: data[:-100], lambda data: b"",
    lambda data: b"<html>404</html>", lambda data: pickle.dumps(Hostile())])
@pytest.mark.parametrize("name", ["model.pt", "last.pt"])
def test_damaged_files_are_refused(finished, tmp_path, monkeypatch, damage, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(damage((finished[0] / name).read_bytes()))
    argv = [name] if name == "model.pt" else [*TINY, "--output", ".", "--resume"]
    status, errors = run_cli(judges.main if name == "model.pt" else cstar.main, argv, monkeypatch)
    assert status == 1 and errors.count("\n") == 1 and "damaged" in errors, errors
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_of_other_content_are_refused(whole, finished, tmp_path):
    artifact = common.read_model(finished[0] / "model.pt")[0]
    changes = {"a script": dict(script="../evil"), "not beside": dict(script="nothing_here"),
               "damaged or not.*format 1": dict(format=1), "damaged or": dict(shapes=[1]),
               "not finite": dict(values=artifact["values"] * math.nan), "its maker|network it": dict(network={}),
               "r not a file of these": dict(values=[1.0]), "fit the network it names": dict(counters={"a": 1}),
               "it names .": dict(shapes=artifact["shapes"] | {"bn1.weight": "x"}),
               "does not fit": dict(network=artifact["network"] | {"width": 2}),
               "fit the network": dict(ranks=artifact["ranks"] | {"layer4.1.conv2": (7, 5)}),
               "values for": dict(values=torch.cat([artifact["values"]] * 2)),
               "does not fit the network it": dict(shapes=artifact["shapes"] | {"bn1.weight": [0, 4]}),
               "network it names": dict(bits=torch.zeros(3, dtype=torch.uint8))}
    for words, change in changes.items():
        torch.save(artifact | change, tmp_path / "changed.pt")
        with pytest.raises(common.Fault, match=words):
            common.load_model(tmp_path / "changed.pt")
    pruned = common.read_model(whole(admm_prune)[0] / "model.pt")[0]
    torch.save(pruned | dict(network=pruned["network"] | {"classes": 9}), tmp_path / "changed.pt")
    with pytest.raises(common.Fault, match="wrong number of classes"):
        common.load_model(tmp_path / "changed.pt")
    torch.save(artifact | dict(attack_settings={"radius": 1}), tmp_path / "changed.pt")
    with pytest.raises(common.Fault, match="does not fit an evaluation"):
        judges.main([str(tmp_path / "changed.pt")])
    torch.save({"hostile": Hostile()}, tmp_path / "changed.pt")
    with pytest.raises(common.Fault, match="damaged or not"):
        common.load_model(tmp_path / "changed.pt")
    assert not (tmp_path / "hacked").exists() and not Path("hacked").exists()


def test_files_that_cannot_be_read_back_are_refused_at_once(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run/result.json").write_text('{"args"')
    status, errors = run_cli(cstar.main, [*TINY, "--output", str(tmp_path / "run")], monkeypatch)
    assert status == 1 and errors.count("\n") == 1 and "result.json does not fit a run" in errors
    (tmp_path / "run/result.json").unlink()
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)
    for change in (dict(phase="prune"), dict(epoch=3), dict(epoch=-1), dict(epoch="1"), dict(states=[]),
                   dict(states={}), dict(random={}), dict(states=dict(model={}, optimizer=3, schedule=None))):
        torch.save(last | change, tmp_path / "run/last.pt")
        argv = [*TINY, "--output", str(tmp_path / "run"), "--resume"]
        status, errors = run_cli(cstar.main, argv, monkeypatch)
        assert status in (1, 2) and errors.count("\n") == 1 and re.search("last.pt|--device", errors), change
    args, data = cstar.get_args([*TINY, "--output", str(tmp_path / "new")]), None
    for script in ("my-cstar.py", "/elsewhere/nothing_here.py"):
        with pytest.raises(common.UsageFault, match="beside common.py"):
            common.Run(args, data, script, {}, [])
    network = dict(arch="lenet", width=1, channels=1, classes=7, size=[8, 8])
    common.save_model(tmp_path / "seven.pt", "cstar", "dense", network, common.build_network(**network), args)
    argv = [str(finished[0] / "model.pt"), "--source", str(tmp_path / "seven.pt")]
    status, errors = run_cli(judges.main, argv, monkeypatch)
    assert status == 2 and errors.count("\n") == 1 and "--source" in errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("spoil, words", [
    (lambda root: (root / "train/ant/0.png").write_text("no image"), "ant/0.png cannot be read"),
    (lambda root: (root / "test/ant/0.png").write_bytes(b"P5 20000 20000 255\n"), "ant/0.png cannot be.*bomb"),
    (lambda root: write_images(root / "x", size=(4, 4))
     or os.replace(root / "x/train/ant/0.png", root / "test/bee/0.png"), "bee/0.png has 4x4 pixels, .*8x8"),
    (lambda root: (root / "test/ant/nested").mkdir(), "ant/nested cannot be read"),
    (lambda root: (root / "train/bee/gone.png").symlink_to("nowhere"), "gone.png cannot be read"),
    (lambda root: [(root / "test" / f"{i:030}").mkdir() for i in range(300)], "^.{0,400}\n$"),
    (lambda root: [p.unlink() for p in (root / "test/bee").iterdir()], "bee holds no images"),
    (lambda root: (root / "test/bee").rename(root / "test/wasp"), "class folders.*wasp"),
    (lambda root: (root / "test").rename(root / "held-out"), "class folders")])
def test_bad_class_folders_are_one_sentence(tmp_path, monkeypatch, spoil, words):
    write_images(tmp_path / "zoo")
    spoil(tmp_path / "zoo")
    argv = ["--dataset", "zoo", "--data-dir", str(tmp_path), "--epsilon", "0.1",
            "--output", str(tmp_path / "run")]
    status, errors = run_cli(cstar.main, argv, monkeypatch)
    assert status == 1 and errors.count("\n") == 1 and re.search(words, errors), errors
    assert not (tmp_path / "run").exists()


def test_absent_data_set_says_where_to_put_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def unreachable(*_, **__):
        raise OSError("Network is unreachable")
    monkeypatch.setattr(datasets, "CIFAR10", unreachable)
    status, errors = run_cli(cstar.main, ["--data-dir", str(tmp_path)], monkeypatch)
    assert status == 1 and errors.count("\n") == 1
    assert "unreachable" in errors and "--dataset digits" in errors


def test_a_signal_while_a_file_is_written_is_no_fault_of_the_disk(tmp_path):
    def stop(*_):
        raise Stop
    content, before = {f"w{i}": torch.zeros(2000) for i in range(500)}, signal.signal(signal.SIGALRM, stop)
    common.save_file(tmp_path / "f.pt", dict(a=1))
    try:
        for i in range(40):
            with pytest.raises(Stop):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0005 * i)
                for _ in range(100):
                    common.save_file(tmp_path / "g.pt", content)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert common.read_file(tmp_path / "f.pt", a=int)["a"] == 1 and not list(tmp_path.glob("*.tmp"))


def test_disk_that_is_full_keeps_the_file_before(tmp_path, monkeypatch):
    common.save_file(tmp_path / "f.pt", dict(a=1))

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(common.Fault, match="No space left.*MiB are free"):
        common.save_file(tmp_path / "f.pt", dict(a=2))
    assert common.read_file(tmp_path / "f.pt", a=int)["a"] == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("steps", range(1, 12))
def test_rate_rises_and_falls_over_any_number_of_steps(steps):
    args, x, rates = cstar.get_args(["--dataset", "digits", "--batch-size", "2"]), torch.zeros(2 * steps), []
    optimizer, schedule = common.make_optimizer(linear(torch.ones(2, 2)), 1.0, 1, common.Data((x, x), None, []), args)
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True) and 0.02 < max(rates) <= 1


def test_diverged_training_stops_with_a_sentence(tmp_path, monkeypatch):
    more = "--lr 10 --weight-decay 1 --pretrain-epochs 50".split()
    status, errors = run_cli(cstar.main, [*TINY, *more, "--output", str(tmp_path / "run")], monkeypatch)
    assert status == 1 and errors.count("\n") == 1 and re.search(r": pretrain \d+/50: .*diverged", errors)
    assert not (tmp_path / "run/result.json").exists()


def test_two_processes_do_not_share_a_folder(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "log.jsonl").touch()
    with open(tmp_path / "log.jsonl") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status, errors = run_cli(cstar.main, [*TINY, "--output", str(tmp_path)], monkeypatch)
    assert status == 2 and "another process" in errors
    for name, content in (("model.pt", ""), ("dense.pt", ""), ("log.jsonl", "one\ntwo\n")):      # someone's
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text(content)
        status, errors = run_cli(cstar.main, [*TINY, "--output", str(folder)], monkeypatch)
        assert status == 2 and errors.count("\n") == 1 and "no last.pt" in errors
        assert [p.read_text() for p in folder.iterdir()] == [content]


# ---------------------------------------------------------------- commands and documents
def write_run(folder, result, dense=(), args=(), **changes):
    """A finished run that differs from `result` in what is given."""
    folder.mkdir(exist_ok=True)
    result = result | changes | dict(dense=result["dense"] | dict(dense), args=result["args"] | dict(args))
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def test_compare_joins_seeds_and_leaves_out_what_is_damaged(finished, tmp_path, capsys, monkeypatch):
    result = finished[1]
    same = dict(result, clean_acc=50.0, robust_acc=20.0, bytes=1000, bytes_ratio=8.0, latency_ms={
        name: dict(dense=6.0, compact=4.0) for name in ("batch_1", "batch_128")}, flags=["twice: 1", "never"])
    folders = [write_run(tmp_path / "zero", same),
               write_run(tmp_path / "one", same, robust_acc=41.0, bytes=3000, bytes_ratio=6.0,
                         flags=["twice: 2"], args=dict(seed=1, ratio=4, pretrained=None))]
    found = {k: same[k] for k in ("script", "bytes", "attack")} | dict(
        dataset="digits", robust_acc=45.0, autoattack_acc=41.23, autoattack_ci=[27.0, 56.8], images=40)
    (tmp_path / "zero/evaluate-autoattack.json").write_text(json.dumps(found))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/result.json").write_text('{"script": "cst')
    compare.main([*folders, str(tmp_path / "torn"), str(tmp_path / "absent"), "--commands"])
    out, errors = capsys.readouterr()
    head, _, row, dense, *folded = out.splitlines()
    assert row == ("| low rank, 4x, ADMM | 2,000 (1,000 to 3,000), 7.0x | 50.0 | 30.5 (20.0 to 41.0; 2 seeds) "
                   "| seed 0: 41.2 (27.0 to 56.8); PGD 45.0; 40 images | 1.5 | never; twice |")
    assert dense.startswith(f"| dense | {result['dense_bytes']:,}, 1.0x | {result['dense']['clean_acc']:.1f} |")
    assert len({line.count("|") for line in (head, row, dense)}) == 1 and "AutoAttack" in head
    assert errors.count("left out: ") == errors.count("\n") == 2 and "torn" in errors and "absent" in errors
    assert folders[0] in folded[3] and folders[1] in folded[3] and result["command"] in folded[4]
    others = [json.dumps(found | other) for other in ({"bytes": 1}, {"dataset": "mnist"}, {"script": "x"})]
    for damaged, reason in [*((other, "another file") for other in others), ("", "Expecting value")]:
        (tmp_path / "zero/evaluate-autoattack.json").write_text(damaged)
        compare.main(folders)
        out, errors = capsys.readouterr()
        assert reason in errors and "AutoAttack" not in out and "2 seeds" in out
    for change in [{k: wrong} for wrong in (None, {}, [1], "x") for k in (
            "latency_ms", "robust_ci", "clean_acc", "nonzeros", "flags", "bytes", "bytes_ratio", "command")
            if (k, wrong) != ("command", "x")] + [dict(nonzeros=0)]:
        write_run(tmp_path / "torn", same, args=dict(seed=2), **change)
        compare.main([*folders, str(tmp_path / "torn")])
        assert "left out" in capsys.readouterr().err
    for argv, status, reason in (
            [folders[:1] * 2, 1, "two of one seed"], [[str(tmp_path / "torn")], 1, "finished run"],
            [[], 2, "folders"], [[*folders, "--refresh", "R"], 2, "folders"],
            [[*folders, "--columns", "bytes,x"], 2, "x is not one"], [[*folders, "--plot", "a.txt"], 2, "end in"],
            [[*folders, "--columns", ",".join(["bytes"] * 9)], 2, "at most 8"]):
        assert (said := run_cli(compare.main, argv, monkeypatch))[0] == status and reason in said[1]


def test_compare_names_rows_as_a_person_does(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, base = finished[1]["args"], {k: finished[1]["args"][k] for k in ("dataset", "width", "seed")}
    admm, hydra = (base | dict(scheme=s, ratio=10.0, finetune_epochs=3) for s in ("filter", "irregular"))
    relax = base | dict(relax_epochs=4, finetune_epochs=2, method="br")
    expected = {
        "low rank, 4x, ADMM": args, "low rank, 4x, one-shot": args | dict(admm_epochs=0),
        "low rank, 4x, bare cut": args | dict(admm_epochs=0, finetune_epochs=0),
        "low rank, uniform ranks, 4x, ADMM": args | dict(rank_rule="uniform"),
        "low rank, 4x fewer MACs, ADMM": args | dict(budget="macs"),
        "low rank, 4x, ADMM, not fine-tuned": args | dict(finetune_epochs=0, lr=0.1, admm_lr=0.7),
        "filters, 10x, ADMM": admm | dict(mode="admm", admm_epochs=3),
        "filters, 10x, one-shot": admm | dict(mode="post", admm_epochs=3),
        "filters, width 1 to 1, lottery ticket": admm | dict(mode="ticket", admm_epochs=3, target_width=1),
        "width 1, from scratch": admm | dict(mode="scratch", admm_epochs=3, target_width=1),
        "single weights, 10x, HYDRA scores": hydra | dict(scores="hydra", objective="pgd", prune_epochs=2),
        "single weights, 10x, lowest magnitudes, TRADES":
            hydra | dict(scores="lwm", objective="trades", prune_epochs=2),
        "1 bit, BinaryConnect": relax | dict(bits=1, method="bc"), "4 bits": relax | dict(bits=4),
        "float, 6 more epochs": relax | dict(bits=32)}
    for i, (label, changed) in enumerate(expected.items()):
        write_run(tmp_path / f"run{i}", finished[1] | dict(args=changed))
    rows = compare.main(["run*"])
    assert {label for label, _ in rows} == {*expected, "dense"}
    assert not capsys.readouterr().err
    # Added are flags that differ and are in no word, and the losses of the attack (loss in older files); where
    # two rows would have one name all flags; to a dense network's name those that shaped it.
    old = {k: v for k, v in finished[1]["attack"].items() if k != "losses"} | dict(loss="margin")
    write_run(tmp_path / "other", finished[1], args=dict(momentum=0.5, width=2), dense=dict(clean_acc=1.0))
    write_run(tmp_path / "third", finished[1], args=dict(admm_lr=0.7), attack=old)
    loss, rate = "+".join(finished[1]["attack"]["losses"]), f"{args['momentum']:g}"
    assert {label for label, _ in compare.main(["run0", "other", "third"])} == {
        f"low rank, 4x, ADMM, loss={loss}, momentum={rate}, width=1", "dense, width=1", "dense, width=2",
        f"low rank, 4x, ADMM, loss={loss}, momentum=0.5, width=2",
        f"low rank, 4x, ADMM, loss=margin, momentum={rate}, width=1"}
    write_run(tmp_path / "third", finished[1], args=dict(admm_lr=0.7))
    assert {label for label, _ in compare.main(["run0", "third"])} == {
        "dense", "low rank, 4x, ADMM, admm_lr=0.7", f"low rank, 4x, ADMM, admm_lr={args['admm_lr']:g}"}


def test_compare_refresh_changes_nothing_here_and_repairs_a_table(tmp_path, capsys, monkeypatch):
    texts = {name: (HERE / name).read_text() for name in ("README.md", "results/README.md")}
    copies = {tmp_path / name.replace("/", "-"): text for name, text in texts.items()}
    monkeypatch.chdir(tmp_path)                                  # folders are as seen from the repository's

    def refresh():
        compare.main(["--refresh", *map(str, copies)])
        assert all(path.read_text() == text for path, text in copies.items())
        return capsys.readouterr().out
    for path, text in copies.items():
        path.write_text(text)
    assert refresh().count("no tables changed") == 2
    for path, text in copies.items():
        rows = re.findall(r"\| (?:1 bit|4 bits) \|[^\n]*\n", text)
        text = text.replace(rows[0], rows[0].replace("1", "7", 3)).replace(rows[-1], "")
        path.write_text(re.sub(r"\n<details>.*?</details>\n", "", text, count=1, flags=re.S))
    assert re.findall("[0-9]+ table", refresh()) != []
    first = next(iter(copies))
    first.write_text(re.sub(r"```\n\n(\|[^\n]*\n)+\n\* Fewer", "```\n\n* Fewer", first.read_text()))
    assert first.read_text() != copies[first] and "1 table changed" in refresh()         # it was missing


def test_compare_draws_and_the_picture_is_that_of_readmes_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from PIL import Image
    monkeypatch.chdir(HERE)
    command, = (line for line in commands_of("README.md") if "compare.py" in line)
    folders = [str(path) for pattern in shlex.split(command)[2:] for path in sorted(Path().glob(pattern))]
    rows = compare.main([*folders, "--plot", str(tmp_path / "picture.png")])
    drawn = Image.open(tmp_path / "picture.png").text["Title"]
    assert drawn == Image.open("results/table.png").text["Title"], f"run: {command} --plot results/table.png"
    assert len(drawn.split("; ")) == len(rows) and "4 bits: 418721 31.7" in drawn and "dense: " in drawn


def test_saved_for_backward_counts_each_tensor_once():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert bench.saved_for_backward(model, torch.rand(7, 3)) == 4 * 7 * (3 + 5)   # the ReLU's serves twice


def test_bench_times_every_step_and_the_naive_one_learns_the_same(capsys, digits):
    command = "--arch lenet --width 4 --batch-size 8 --num-steps 1 --rounds 2 --amp off --device cpu"
    result = bench.main(command.split())
    assert json.loads(capsys.readouterr().out) == result
    steps = result["steps"]
    assert set(steps) == {"naive", "default", "hydra_prune without", "binary_relax without",
                          *(script.__name__ for script in SCRIPTS)} and steps["naive"]["times_naive"] == 1
    for step in steps.values():
        assert 0.99 < step["images_per_second"] * step["seconds"] / 8 < 1.01 or step["seconds"] < 0.02
    assert set(result["added_per_cent"]) == {script.__name__ for script in SCRIPTS}
    hardware, sizes = result["hardware"], result["inference"]["params_ratio"]
    network = common.build_network("lenet", 4, 3, 10, (32, 32)).eval()
    forward = 2e-9 * 8 * common.count_macs(network, dict(channels=3, size=(32, 32)))
    assert hardware["gflop_a_step"] == pytest.approx(dict(naive=6 * forward, default=5 * forward), rel=1e-3)
    float32, bfloat16 = hardware["matrix_gflop_per_second"].values()
    assert float32 > 0 and bfloat16 > 0 and hardware["times_naive_at_these_rates"] == 1.2      # --amp off
    assert 50 < sum(hardware["profile_per_cent"].values()) < 100.5
    assert sizes["dense"] == 1 and sizes["filters"] > 8 and 15.9 < sizes["cstar hull"] < 16.6
    assert set(result["inference"]["batch_1_ms"]) == {*sizes, *(f"{name}, folded" for name in sizes)}
    batch = next(digits.batches(16, torch.Generator().manual_seed(1)))
    args = cstar.get_args("--dataset digits --device cpu --amp off --num-steps 3 --weight-decay 0".split())
    model = common.build_network("lenet", 1, 1, 10, (8, 8))
    twin = copy.deepcopy(model)
    optimizer, schedule = common.make_optimizer(model, 0.1, 1, digits, args)
    rate = schedule.get_last_lr()[0]
    torch.manual_seed(5)
    cstar.train_epoch(model, [batch], optimizer, schedule, args)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(twin.parameters(), rate, 0.9, nesterov=True)
    bench.naive_step(twin, optimizer, *batch, args.epsilon, args.step_size, args.num_steps)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), twin.parameters()))


@every_script
def test_every_label_of_a_docstring_stands_in_the_code(script):
    text = Path(script.__file__).read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    code = text.replace(docstring, "", 1)
    labels = set(re.findall(r"\[[A-Z]\]", docstring))
    assert len(labels) >= 4 and labels == set(re.findall(r"\[[A-Z]\]", code))


def commands_of(name):
    text = (HERE / name).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [re.split(" #| > ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("python ")]


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_readme_commands_parse_and_its_tables_have_at_most_8_columns(name):
    text, commands = (HERE / name).read_text(), commands_of(name)
    assert len(commands) >= 4 and "common.py " not in text
    for command in commands:
        _, script, *argv = shlex.split(command)
        if script != "-m":
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            more = ["--device", "cpu"] if module is not compare else []
            args = module.get_args([*argv, *more])
            assert not getattr(args, "model", "").startswith("results/") or (HERE / args.model).is_file()
    assert max(line.count("|") - line.count("\\|") for line in text.splitlines() if line[:1] == "|") <= 9


def test_readme_begins_with_the_three_commands_that_ci_runs_and_is_short():
    text = (HERE / "README.md").read_text()
    first = re.search(r"```sh\n(.*?)```", text, re.S)[1].splitlines()
    assert [re.split(r"[/ ]", line)[0] for line in first] == ["pip", "python", "python"] and len(first) == 3
    assert "pytest" in first[1] and "tools/evaluate.py results/" in first[2]
    assert len(text.splitlines()) <= 200


def test_results_are_one_table_in_which_no_run_stands_twice(capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    folders = sorted(str(path.parent) for path in Path("results").glob("*/result.json"))
    table = compare.main(folders)
    assert sorted(run["folder"] for _, runs in table for run in runs if "folder" in run) == folders
    assert len({label for label, _ in table}) == len(table) and not capsys.readouterr().err


def test_readme_snippet_classifies_an_image(capsys, monkeypatch, digits):
    monkeypatch.chdir(HERE)
    snippet, = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == str(digits.test[1][0].item())


@pytest.mark.parametrize("folder", sorted((HERE / "results").glob("*/")), ids=lambda folder: folder.name)
def test_results_hold_the_log_that_ends_in_their_result(folder, digits):
    result = json.loads((folder / "result.json").read_text())
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "final"
    assert all(last[k] == result[k] for k in ("clean_acc", "robust_acc", "bytes", "images"))
    if (folder / "model.pt").is_file():                          # a shipped one: one a script
        assert (folder / "model.pt").stat().st_size == result["bytes"]
        images = [t[:100] for t in digits.test]
        model = common.load_model(folder / "model.pt")
        assert common.evaluate(model, images, **SETTINGS)["robust_acc"] > 50


@every_script
def test_every_script_ships_a_network(script):
    shipped = [json.loads(path.with_name("result.json").read_text())["script"]
               for path in (HERE / "results").glob("*/model.pt")]
    assert script.__name__ in shipped


# ---------------------------------------------------------------- photos, and networks that others trained
@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Flags of a set of 16 + 4 photos of different sizes in two classes, a dark one and a light one."""
    from PIL import Image
    monkeypatch.setattr(common, "PHOTO", 32)
    for split, label, i in [(*place, i) for place in itertools.product(("train", "val"), (0, 1)) for i in range(8)]:
        if split == "train" or i < 2:
            (folder := tmp_path / "zoo" / split / f"class{label}").mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng(10 * i + label)
            pixels = generator.integers(90 * label, 160 + 90 * label, (5 + i, 9, 3), np.uint8)
            Image.fromarray(pixels).resize((60 - 3 * i, 40 + 9 * i)).save(folder / f"{i}.jpg")
    return (f"--dataset zoo --data-dir {tmp_path} --epsilon 4/255 --device cpu --batch-size 8 --num-steps 1 --lr 0.01 "
            "--eval-steps 2 --restarts 1 --pretrain-epochs 0 --amp off --finetune-epochs 2").split()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_photos_are_cut_by_seed_epoch_and_index_whatever_the_workers_and_the_batches(zoo, tmp_path):
    from torchvision.io import decode_image
    from torchvision.transforms import v2
    (data, other), epochs = (common.load_data(cstar.get_args([*zoo, "--workers", n])) for n in "13"), []
    for one, generator in ((data, torch.Generator()), (other, torch.Generator())):
        epochs.append([torch.cat([x for x, _ in one.batches(4, generator)]) for _ in range(2)])
    assert all(map(torch.equal, *epochs)) and epochs[0][0].shape == (16, 3, 32, 32)
    seen = [list(data.train[0].load(map(torch.tensor, batches), "cpu", seed)) for batches, seed in (
        ([[3, 7, 0], [5]], 1), ([[5, 0], [7]], 1), ([[5, 0]], 2))]
    assert torch.equal(seen[0][0][[1, 2]], torch.stack([seen[1][1][0], seen[1][0][1]]))
    assert torch.equal(seen[0][1][0], seen[1][0][0]) and not (seen[1][0] == seen[2][0]).flatten(1).all(1).any()
    paths = [tmp_path / "zoo/val" / f"class{label}/{i}.jpg" for i in (0, 1) for label in (0, 1)]           # balanced
    middle = v2.Compose([v2.Resize(36), v2.CenterCrop(32)])
    assert torch.equal(data.test[0], torch.stack([middle(decode_image(str(p), "RGB")) for p in paths]))
    x, y = next(data.batches(16, torch.Generator()))
    assert data.test[1].tolist() == [0, 1, 0, 1] and ((x.mean((1, 2, 3)) > 0.5) == y.bool()).all()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("spoil", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"BM" + data])
def test_photo_that_is_none_is_one_sentence_with_its_path(zoo, tmp_path, monkeypatch, split, spoil):
    path = tmp_path / "zoo" / split / "class1/1.jpg"
    path.write_bytes(spoil(path.read_bytes()))
    argv = [*zoo, "--width", "1", "--output", str(tmp_path / "run")]
    status, errors = run_cli(cstar.main, argv, monkeypatch)
    assert status == 1 and errors.count("\n") == 1 and re.search(rf"{path} cannot be read.*\([^/]*\)$", errors), errors


@every_script
def test_photos_resume_bit_for_bit(zoo, tmp_path, monkeypatch, script):
    phase, save = {hydra_prune: "prune", binary_relax: "relax"}.get(script, "admm"), common.Run.save
    argv = [*zoo, "--arch", "resnet18", "--width=1", f"--{phase}-epochs=1", "--output", str(tmp_path / "run")]

    def stopping(run, epoch, stateful):
        save(run, epoch, stateful)
        if (run.phase, epoch) == ("finetune", 1):
            raise Stop
    unevaluated(monkeypatch)
    script.main([*argv[:-1], str(tmp_path / "whole")])
    monkeypatch.setattr(common.Run, "save", stopping)
    with pytest.raises(Stop):
        script.main(argv)
    monkeypatch.setattr(common.Run, "save", save)
    script.main([*argv, "--resume"])
    assert same_weights(tmp_path / "whole/model.pt", tmp_path / "run/model.pt")


def test_torchvision_network_comes_to_its_result_within_cstars_budget(zoo, tmp_path):
    argv = [*zoo, "--arch", "imagenet_resnet18", "--admm-epochs", "0", "--output", str(tmp_path / "run")]
    result = cstar.main(argv)
    assert result["images"] == 4 and 16 <= result["params_ratio"] < 16.1 and result["bytes_ratio"] > 15


@pytest.mark.parametrize("arch", ["imagenet_resnet18", "imagenet_resnet50"])
def test_torchvision_networks_are_their_own_and_lose_filters_exactly(arch):
    from torchvision import models
    model = shaken(arch, 16, 3, 64, torch.float32).eval()
    own = getattr(models, arch.removeprefix("imagenet_"))(num_classes=10).eval()
    own.load_state_dict(model.state_dict())
    x, mean, std = torch.rand(2, 3, 64, 64), *torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    assert torch.equal(model(x), own((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
    shortcuts = {f"layer{i}.0.downsample.0.weight" for i in range(1 + (arch == "imagenet_resnet18"), 5)}
    float_ones = {n for n, p in model.named_parameters() if p.dim() > 1} - binary_relax.quantisable(model).keys()
    assert float_ones == shortcuts | {"fc.weight"}
    masks = common.parameter_masks(model, filter_masks(model, 2), True)
    common.apply_masks_(model, masks)
    full, before = model(x), sum(p.numel() for p in model.parameters())
    small, _ = common.remove_filters_(model, masks)
    assert (small(x) - full).abs().max() <= 1e-5 * full.abs().max()
    assert sum(p.numel() for p in small.parameters()) < 0.45 * before


PUBLISHED = [lambda state: state, lambda state: dict(state_dict=state, epoch=9, best=torch.tensor(1.0)),
             lambda state: {"net": {f"module.{k}": t for k, t in state.items()}, "acc": 95.0},
             lambda state: {"model": {f"model.{k}": t.half() if t.dim() else t for k, t in state.items()}},
             lambda state: {"model": {f"module.{a}model.{k}": t for a in ("attacker.", "") for k, t in state.items()}}]


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("rename", [lambda k: k, lambda k: k.replace("shortcut", "downsample").replace("linear", "fc")])
def test_pretrained_takes_what_others_published_with_their_normalisation(tmp_path, monkeypatch, digits, form, rename):
    own, images = shaken("resnet18", 1, 1, 8, torch.float32).half().float().eval(), common.to_float(digits.test[0][:40])
    torch.save(form({rename(k): t for k, t in own.state_dict().items()}), tmp_path / "theirs.pt",
               _use_new_zipfile_serialization=form is not PUBLISHED[0])
    unevaluated(monkeypatch)
    argv = (f"--admm-epochs 0 --finetune-epochs 0 --mean 0.3 --std 0.5 --pretrained {tmp_path}/theirs.pt --output "
            f"{tmp_path}/run").split()
    cstar.main([*TINY[:TINY.index("--pretrain-epochs")], *TINY[TINY.index("--num-steps"):], *argv])
    with torch.no_grad():                                        # others normalise outside of the network
        assert torch.equal(common.load_model(tmp_path / "run/dense.pt")(images), own((images - 0.3) / 0.5))
    artifact, compact = common.read_model(tmp_path / "run/model.pt")
    assert (artifact["network"]["mean"], artifact["network"]["std"]) == ([0.3], [0.5])
    assert sum(p.numel() for p in compact.parameters()) <= sum(p.numel() for p in own.parameters()) / 4


@pytest.mark.parametrize("change, words", [
    (lambda s: s | {"linear.weight": torch.zeros(9, 32)}, r"its linear.weight is \(9, 32\), wanted: \(10, 32\)"),
    (lambda s: s | {"mu": torch.zeros(1)}, "its mu has no place"), (lambda s: [s], r"conv1.weight is missing, wanted: \(4"),
    (lambda s: s | {"bn1.bias": s["bn1.bias"] * math.nan}, "bn1.bias is not finite"),
    (lambda s: {k: t for k, t in s.items() if k != "bn1.bias"}, "bn1.bias is missing"),
    (lambda s: s | {"hostile": Hostile()}, "could run code")])
def test_pretrained_that_does_not_fit_is_one_sentence_and_runs_no_code(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    torch.save(change(resnet().state_dict()), "theirs.pt")
    unevaluated(monkeypatch)
    status, errors = run_cli(cstar.main, ("--dataset digits --arch resnet18 --width 1 --pretrained theirs.pt --output run "
                                          "--device cpu --admm-epochs 0 --finetune-epochs 0").split(), monkeypatch)
    assert status in (1, 2) and errors.count("\n") == 1 and re.search(words, errors), errors
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.pt"]


def test_normalisation_is_in_the_bounds_and_photos_are_evaluated_a_few_at_a_time():
    model, x, y = chain(0, "cnn_small")
    common.normalised(model, [0.3, 0.6], [0.5, 0.2]).double()
    assert all(torch.allclose(bound, margins(model, x, y)) for bound in all_bounds(model, x, y, 0.0).values())
    model, sizes = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 3)), []
    images = torch.randint(0, 256, (30, 3, 224, 224), dtype=torch.uint8), torch.arange(30) % 3
    model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    common.evaluate(model, images, **SETTINGS | dict(num_steps=2))
    common.sanity_flags(model, images, **SETTINGS | dict(num_steps=2))
    assert sizes.count(30) == 4 and max(sizes) == 30             # the four are to see whether output is random
    small = torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.zeros(300)
    assert [[len(x) for x, _ in common.batched(*some)] for some in (images, small)] == [[27, 3], [250, 50]]
