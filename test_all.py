"""Correctness on tiny networks, on a CPU; tests against libraries (.ci/run has all) are skipped without."""
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
import platform
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
from unittest.mock import Mock

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
PHASE = dict(zip(SCRIPTS, ("admm", "admm", "prune", "relax")))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
SHIPPED = HERE / "results" / "digits-cstar-s0"
TINY = ("--dataset digits --arch resnet18 --width 1 --train-images 128 --eval-images 40 --batch-size 32 "
        "--pretrain-epochs 2 --admm-epochs 2 --finetune-epochs 2 --num-steps 2 --eval-steps 3 --restarts 1 "
        "--ratio 4 --device cpu")
UNTRAINED = "--pretrain-epochs 0 --admm-epochs 0 --finetune-epochs 0"
Stop = type("Stop", (Exception,), {})
Hostile = type("Hostile", (), dict(__reduce__=lambda self: (os.system, ("touch hacked",))))
Terminal = type("Terminal", (io.StringIO,), dict(isatty=lambda self: True))
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:This process .*fork:DeprecationWarning")        # of photos


def unevaluated(monkeypatch):
    """From here on runs end with their model.pt and give what is only the script's: evaluation takes long."""
    monkeypatch.setattr(common.Run, "finish", lambda run, *judge, **more: more)


def argv_of(*parts):
    """The arguments of a command: strings are split like a shell's, paths stay whole."""
    return [word for part in parts for word in (shlex.split(part) if isinstance(part, str) else [str(part)])]


def tiny(folder, *more, script=cstar, evaluate=False):
    flags = TINY.replace("admm", PHASE[script])
    if script is binary_relax:
        flags = flags.replace("resnet18", "enresnet --depth 8 --noise 0").replace("--ratio 4", "--bits 2")
    with pytest.MonkeyPatch.context() as patch:
        if not evaluate:
            unevaluated(patch)
        return script.main(argv_of(flags, "--output", folder, *more))


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def digits_args(script, flags=""):
    return script.get_args(["--dataset", "digits", "--device", "cpu", "--amp", "off", *flags.split()])


def sgd(parameters, lr, **more):
    optimizer = torch.optim.SGD(parameters, lr, **more)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1)


def stopped(saves, run):
    def stopping(run, *args):
        save(run, *args)
        if next(count) == saves:
            raise Stop
    save, count = common.Run.save, itertools.count(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common.Run, "save", stopping)
        run()


def fails(status, words, function, *args, **more):
    """function(*args, **more) is a Fault with these words; status is 2 where flags are wrong. The message."""
    with pytest.raises(common.Fault, match=words) as fault:
        function(*args, **more)
    assert getattr(fault.value, "status", 1) == status
    return str(fault.value)


def same_weights(a, b):
    a, b = (common.load_model(path).state_dict() for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def conv_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resnet(width=1, channels=1, classes=10, size=8):
    torch.manual_seed(0)
    return common.build_network("resnet18", width, channels, classes, (size, size))


def trained(flags):
    args, generator = digits_args(cstar, flags), torch.Generator().manual_seed(0)
    data = common.load_data(args)
    model = common.build_network(**common.network_of(args, data))
    optimizer = common.make_optimizer(model, args.lr, args.pretrain_epochs, data, args)
    for _ in range(args.pretrain_epochs):
        cstar.train_epoch(model, data.batches(args.batch_size, generator), *optimizer, args)
    return model.eval()


LENET = "--arch lenet --width 8 --pretrain-epochs 15 --batch-size 32 --lr 0.05 --epsilon"
digits = pytest.fixture(lambda: common.load_data(digits_args(cstar)), scope="session")
robust = pytest.fixture(lambda: trained(f"{LENET} 0.2 --num-steps 4 --step-size 0.1"), scope="session")
standard = pytest.fixture(lambda: trained(f"{LENET} 0 --num-steps 0"), scope="session")
finished = pytest.fixture(lambda whole: whole(cstar), scope="session")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    @functools.cache
    def run(script, evaluate, *more):
        folder = tmp_path_factory.mktemp("run") / "whole"
        return folder, tiny(folder, *more, script=script, evaluate=evaluate)
    return lambda script, *more, evaluate=True: run(script, evaluate, *filter(None, more))


@pytest.fixture(scope="session", autouse=True)
def real_latency():
    """common.latency, which takes a second: in the runs here it is a number of parameters."""
    latency = common.latency
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "latency", lambda models, network, batch, device: [
            batch * sum(p.numel() for p in model.parameters()) for model in models])
        yield latency


# ---------------------------------------------------------------- data
def test_data_subsets_are_balanced_prefixes_and_an_epoch_is_a_shuffle_without_repetition(digits):
    images, labels = digits.train[0], digits.train[1].numpy()
    small, large = common.balanced(labels, 50), common.balanced(labels, 200)
    assert set(small) <= set(large) and len(set(large)) == 200
    x = [x for x, _ in digits.batches(100, torch.Generator().manual_seed(1))]
    assert len(x) == 14 and all(b.shape == (100, 1, 8, 8) for b in x)
    once = [len(x) for x, _ in digits.batches(10**4, torch.Generator())]
    assert once == [len(images)] and digits.steps(10**4) == 1
    flat, whole = torch.cat(x).flatten(1), images.float().div(255).flatten(1)
    assert flat.min() == 0 and flat.max() == 1 and not torch.equal(flat, whole[:1400])
    assert len(flat.unique(dim=0)) >= 1400 - (len(whole) - len(whole.unique(dim=0)))
    with np.load(HERE / "data" / "digits.npz") as stored:
        x, y = stored["images"], stored["labels"]
    ours, labels = (torch.cat(pair).numpy() for pair in zip(digits.train, digits.test))  # no image is in both
    assert (ours[:, 0] == np.rint(x * (255 / 16))).all() and (labels == y).all()
    assert len(digits.test[1]) == 360
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    assert (x == theirs.images).all() and (y == theirs.target).all()


def test_data_flags_take_balanced_subsets_and_a_cpu_judges_1000_images(digits, monkeypatch):
    data = common.load_data(digits_args(cstar, "--train-images 50 --eval-images 20"))
    for (x, y), (images, labels), each in zip((data.train, data.test), (digits.train, digits.test), (5, 2)):
        first = common.balanced(labels.numpy(), 10 * each)
        assert y.bincount().tolist() == [each] * 10 and torch.equal(x, images[first])
    pair = np.zeros((1100, 1, 28, 28), np.uint8), np.arange(1100) % 10
    monkeypatch.setattr(common, "read_torchvision", lambda *_: (pair, pair, list("0123456789")))
    args = cstar.get_args("--dataset mnist --data-dir nowhere --device cpu".split())
    for device, count in (("cpu", 1000), ("meta", 1100)):        # any other device has time for all
        args.device = device
        data = common.load_data(args)
        assert [len(y) for _, y in (data.train, data.test)] == [1100, count]


def test_each_process_has_its_own_gpu_and_a_share_of_two_images_or_more(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen := Mock())
    monkeypatch.setattr(common, "world", lambda: 2)
    for name, value in (("LOCAL_RANK", "3"), ("RANK", "7")):
        monkeypatch.setenv(name, value)
    assert common.check_device("auto") == common.check_device("cuda") == "cuda:3"
    chosen.assert_called_with("cuda:3")
    fails(2, "cuda:1 is none of .* cuda, cpu", common.check_device, "cuda:1")
    fails(2, "2 is not 2 equal shares of 2", cstar.get_args, "--device cpu --batch-size 2".split())


@pytest.mark.parametrize("name, shape, varied", [
    ("MNIST", (5, 4), (0, False)), ("CIFAR10", (5, 4, 3), (4, True)), ("CIFAR100", (5, 4, 3), (4, True)),
    ("SVHN", (3, 5, 4), (4, False))])
def test_data_of_torchvision_are_their_pixels_and_splits(tmp_path, monkeypatch, name, shape, varied):
    def read(root, split, download):
        assert (root, download) == (str(tmp_path), True)
        which = {True: "train", False: "test"}.get(split, split)
        count = dict(train=30, test=20)[which]
        pixels = np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)
        x = pixels if name != "MNIST" else torch.from_numpy(pixels)
        made.append(pixels if name == "SVHN" else pixels.reshape(count, 5, 4, -1).transpose(0, 3, 1, 2))
        return Mock(data=x, classes=list("abcdefghij"), **{
            "labels" if name == "SVHN" else "targets": [i % 10 for i in range(count)]})
    made = []
    monkeypatch.setattr(pytest.importorskip("torchvision.datasets"), name, read)
    data = common.load_data(cstar.get_args([f"--dataset={name.lower()}", f"--data-dir={tmp_path}",
                                            "--device=cpu", "--eval-images=0"]))
    for (x, y), pixels in zip((data.train, data.test), made):
        assert (x.numpy() == pixels).all() and y.tolist() == [i % 10 for i in range(len(pixels))]
    assert [len(x) for x, _ in (data.train, data.test)] == [30, 20] and (data.crop, data.flip) == varied


def test_data_batches_crop_and_flip_each_image_by_itself(monkeypatch):
    """Of 401 copies of one image, all places of a crop occur, half of them mirrored, and nothing else."""
    image = torch.arange(20, dtype=torch.uint8).view(4, 5)
    padded, pair = F.pad(image, (1,) * 4), (image.expand(401, 1, -1, -1), torch.zeros(401))
    places = [padded[dy:dy + 4, dx:dx + 5] for dy, dx in itertools.product(range(3), range(3))]
    for crop, views in ((0, [image]), (1, places)):
        for flip, wanted in ((False, views), (True, views + [view.flip(1) for view in views])):
            data = common.Data(pair, pair, [], crop, flip)
            (x, _), = data.batches(401, torch.Generator().manual_seed(0))
            found = {tuple(pixels) for pixels in (255 * x).round().flatten(1).tolist()}
            assert found == {tuple(view.flatten().tolist()) for view in wanted}
            mirrored = x[:, 0, 1, 1] > x[:, 0, 1, 3]
            assert mirrored.double().mean().item() == pytest.approx(0.5 * flip, abs=0.1)
    monkeypatch.setattr(common, "world", lambda: 2)              # equal shares of what one process gets
    for one in (0, 1):
        monkeypatch.setattr(common, "rank", lambda: one)
        (share, _), = data.batches(401, torch.Generator().manual_seed(0))
        assert torch.equal(share, x[one:400:2])


def write_images(root, mode="RGB", size=(8, 8), test="test", grow=0):
    from PIL import Image
    rng, colours = np.random.default_rng(0), (3,) * (mode == "RGB")
    for split, label, i in itertools.product(("train", test), (0, 1), range(6)):
        folder, shape = root / split / ("ant", "bee")[label], (size[1] + grow * i, size[0] - grow * i)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(90 * label, 160 + 90 * label, (*shape, *colours), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{'jpg' if grow else 'png'}")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    write_images((root := tmp_path_factory.mktemp("photos")) / "zoo", size=(45, 40), test="val", grow=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "PHOTO", 32)
        flags = "--train-images 0 --eval-images 0 --batch-size 4 --pretrain-epochs 0 --num-steps 1"
        yield ["--dataset zoo --epsilon 4/255 --data-dir", root, flags]


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_data_class_folders_are_their_pixels_whatever_lies_beside_them(tmp_path, mode, channels, monkeypatch):
    """Clutter, one grey image among those in colour and a data set's name change nothing."""
    from PIL import Image
    zoo = tmp_path / "zoo"
    write_images(zoo, mode, size=(9, 8))
    args = cstar.get_args(["--dataset=zoo", f"--data-dir={tmp_path}", "--epsilon=8/255", "--device=cpu"])
    first = common.load_data(args)
    pixels = np.asarray(Image.open(zoo / "train/bee/2.png")).reshape(8, 9, channels)
    assert (first.train[0][8].permute(1, 2, 0).numpy() == pixels).all() and first.train[1][8] == 1
    assert os.listdir(tmp_path) == ["zoo"] and first.test[1].tolist() == [0, 1] * 6
    assert args.step_size == args.epsilon / 4 and first.classes == ["ant", "bee"]
    assert (first.crop, first.flip) == (0, False)                # letters of a user's are not mirrored
    for clutter in (".DS_Store", "train/Thumbs.db", "train/ant/Thumbs.db", "test/bee/.hidden"):
        (zoo / clutter).write_text("clutter")
    for folder in (".ipynb_checkpoints", "train/.ipynb_checkpoints", "train/ant/.ipynb_checkpoints"):
        (zoo / folder).mkdir()
    if mode == "RGB":
        Image.fromarray(pixels[..., 0]).save(zoo / "train/ant/0.png")
        first.train[0][0] = torch.from_numpy(pixels[..., 0].copy())
    else:                                                        # grey with an alpha channel is grey
        Image.open(zoo / "train/ant/0.png").convert("LA").save(zoo / "train/ant/0.png")
    shutil.copytree(zoo / "train", zoo / "val")                  # beside a test it is not looked at
    assert torch.equal(common.load_data(args).test[0], first.test[0])
    args.dataset = zoo.rename(tmp_path / "mnist").name
    again = common.load_data(args)
    assert torch.equal(first.train[0], again.train[0]) and torch.equal(first.test[1], again.test[1])
    monkeypatch.setattr(common, "PHOTO", 8)                      # networks for photos want colour
    assert common.load_data(args).train[0].shape == (12, 3, 8, 9)
    (tmp_path / "deep.pgm").write_bytes(b"P5 8 9 65535\n" + bytes(2 * 72))
    fails(1, "deep.pgm cannot .* not 8 bits", common.read_image, tmp_path / "deep.pgm")


# ---------------------------------------------------------------- networks
@pytest.mark.parametrize("arch, channels, size, other, layers, counts", [        # width -> parameters
    ("lenet", 1, 28, (8, 12), [3, 2, 0], {1: 13514, 2: 52506, 4: 206954, 8: 821706, 16: 3274634}),
    ("lenet", 3, 32, (20, 16), [4, 2, 0],
     {1: 62006, 2: 244962, 4: 973754, 8: 3882858, 16: 15507146}),
    ("vgg16", 3, 32, (32, 40), [13, 5, 1], {1: 58686, 2: 232274, 4: 924186, 8: 3686954, 16: 14728266}),
    ("resnet18", 3, 32, (9, 8), [17, 0, 1], {1: 44622, 2: 176402, 4: 701466, 8: 2797610, 16: 11173962}),
    ("wrn28_4", 3, 32, (5, 4), [25, 0, 1], {16: 5849050}),
    ("cnn_small", 1, 28, (8, 12), [3, 0, 0], {1: 824, 2: 2867, 16: 166406}),
    ("cnn_large", 3, 32, (8, 7), [6, 0, 0], {16: 2466858})])
def test_networks_have_the_papers_parameter_counts_and_take_other_sizes(
        arch, channels, size, other, layers, counts, monkeypatch):
    """Parameters are those of the papers' tables; layers are those of ReLU, max pooling, mean pooling."""
    called, relu = [], F.relu
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: called.append(1) or relu(x))
    with torch.device("meta"):
        for width, count in counts.items():
            model = common.build_network(arch, width, channels, 10, (size, size))
            assert sum(p.numel() for p in model.parameters()) == count
    odd = channels if channels == 1 else channels + 1            # of one channel LeNet is another network
    model = common.build_network(arch, 1, odd, 7, other)
    assert model(torch.rand(2, odd, *other)).shape == (2, 7)
    pools = [sum(type(m) is kind for m in model.modules()) for kind in (nn.MaxPool2d, nn.AdaptiveAvgPool2d)]
    assert [len(called), *pools] == layers
    if arch == "lenet" and channels > 1:                         # 16 pixels is its least
        fails(2, "too deep", common.build_network, arch, 1, channels, 7, (15, 16))
    if arch == "vgg16":
        from torchvision import models
        with torch.device("meta"):
            theirs = models.vgg16_bn().features
        assert [*map(type, model.features)] == [*map(type, theirs)]
    fails(2, "too deep", common.build_network, arch, 1, channels, 7, (3, 3))


def test_resnet18_has_the_common_layer_names_and_its_macs_and_those_of_tokens_equal_the_sum_by_hand():
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight",
            "layer4.1.bn2.bias", "linear.bias"} <= resnet().state_dict().keys()
    w, total = [64, 64, 128, 256, 512], 32 * 32 * 27 * 64 + 512 * 10
    for i in range(4):
        side = 32 // 2**i
        total += side * side * (9 * w[i] * w[i + 1] + 3 * 9 * w[i + 1] ** 2 + (w[i] * w[i + 1] if i else 0))
    network = dict(arch="resnet18", width=16, channels=3, classes=10, size=[32, 32])
    assert common.count_macs(common.build_network(**network), network) == total
    kind = type("Tokens", (nn.Sequential,), dict(forward=lambda self, x: nn.Sequential(*[*self][1:])(
        self[0](x).flatten(2).mT)))
    n, d, hidden, network = 16, 8, 24, dict(channels=3, size=(8, 8))
    model = kind(nn.Conv2d(3, d, 2, 2), nn.Linear(d, d))
    assert cstar.positions(model, network) == {"0": (64, n), "1": (n, n)}
    model.append(nn.TransformerEncoderLayer(d, 2, hidden, dropout=0.0, batch_first=True))
    assert common.count_macs(model, network) == n * (12 * d + d * d + 4 * d * d + 2 * d * hidden)


# ---------------------------------------------------------------- the attack
def linear(weight, *bias):
    """By default without a bias. One pixel and linear(STEP, 0.5, 0): class 1 where it is above one half."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), torch.tensor(bias or [0.0] * len(weight))
    return nn.Sequential(nn.Flatten(), layer).eval()


STEP = torch.tensor([[0.0], [1.0]])


def test_pgd_reaches_the_closed_form_optimum_of_a_linear_network():
    """With either loss; epsilon 0 gives the image, and a loss of one's own is asked num_steps * eot times."""
    w, x, y, asked = conv_weight(2, 12).float(), torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1]), []
    direction = (w[1] - w[0]).sign().view(1, 3, 2, 2) * (1 - 2 * y.float()).view(-1, 1, 1, 1)
    best = (x + 0.1 * direction).clamp(0, 1)
    for settings in (dict(step_size=0.1, num_steps=1, random_start=False), dict(step_size=0.03, num_steps=10),
                     dict(step_size=0.03, num_steps=10, loss="margin")):
        assert torch.allclose(common.pgd(linear(w), x, y, 0.1, **settings), best, atol=1e-6)
    assert torch.equal(common.pgd(linear(w), x, y, 0.0, 0.1, 3), x)
    assert (common.pgd(linear(w), x, y, 1.0, 0.1, 0) - 0.5).abs().max() <= 0.5           # the start too
    factors = itertools.cycle((1.0, -3.0, 1.0))                  # the mean of three passes decides
    x_adv = common.pgd(linear(w), x, y, 0.1, 0.1, 3, eot=3, loss=lambda logits, _: (
        asked.append(1) or next(factors) * logits[:, 0]))
    assert len(asked) == 9
    assert torch.allclose(x_adv, (x - 0.1 * w[0].sign().view(1, 3, 2, 2)).clamp(0, 1), atol=1e-6)
    factors = iter((math.inf, 1.0, 1.0))                         # at the first step alone
    fails(1, "gradient is not finite", common.pgd, linear(w), x, y, 0.1, 0.1, 3,
          loss=lambda logits, _: next(factors) * logits[:, 0])
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, 0.0, -1.0]])
    assert torch.equal(common.margin_loss(logits, torch.tensor([2, 0])), torch.tensor([1.5, -3.0]))


def test_pgd_equals_foolbox_without_random_start(robust, digits):
    foolbox = pytest.importorskip("foolbox")
    x, y = common.to_float(digits.test[0][:100]), digits.test[1][:100]
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=20, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(robust, bounds=(0, 1), device="cpu"), x, y, epsilons=0.2)
    ours = common.pgd(robust, x, y, 0.2, 0.03, 20, random_start=False)
    assert ((ours - theirs).abs() > 1e-6).double().mean() < 1e-3         # signs of gradients near 0


@pytest.mark.parametrize("training", [True, False])
def test_pgd_leaves_weights_gradients_modes_and_statistics_alone(training):
    def settings():
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    model, x = resnet().train(training), torch.rand(6, 1, 8, 8)
    model.bn1.eval()
    model.linear.bias.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before, settings_before = copy.deepcopy(model.state_dict()), settings()
    x_adv = common.pgd(model, x, torch.arange(6), 0.2, 0.05, 4)
    assert not x_adv.requires_grad and (x_adv - x).abs().max() <= 0.2 + 1e-6
    assert 0 <= x_adv.min() and x_adv.max() <= 1 and settings() == settings_before
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in list(model.parameters())[1:]) and (model.conv1.weight.grad == 1).all()


class Waits(TorchDispatchMode):
    """Counts what a GPU would stop for: reading a value, and shapes that depend on values."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.name() == "aten::index.Tensor" and any(
            i is not None and i.dtype == torch.bool for i in args[1])
        self.count += masks or func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **kwargs or {})


@every_script
def test_training_attacks_in_eval_mode_has_losses_of_float32_and_waits_for_a_gpu_in_pgds_two_checks_alone(
        script, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", loss := Mock(wraps=F.cross_entropy))
    args, x, y = digits_args(script, "--num-steps 3 --amp on"), torch.rand(8, 1, 8, 8), torch.arange(8)
    modes, waits, products = [], [], []
    for batches in (1, 3):
        model = resnet()
        scores, weights = hydra_prune.Scores(model, "irregular", 5), [model.conv1.weight, model.linear.weight]
        masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters()}
        more = {cstar: dict(penalty=lambda: sum(w.square().sum() for w in weights)),
                admm_prune: dict(masks=masks), hydra_prune: dict(scores=scores),
                binary_relax: dict(weights=weights, lam=2.0)}[script]
        optimizer = sgd((scores if script is hydra_prune else model).parameters(), 0.01)
        model.register_forward_pre_hook(lambda m, _: modes.append(m.training))
        model.register_forward_hook(lambda model, inputs, out: products.append(out.dtype))
        with Waits() as found:
            script.train_epoch(model, [(x, y)] * batches, *optimizer, args, **more)
        waits.append(found.count)
    assert modes == ([False] * 3 + [True] * (2 if script is binary_relax else 1)) * 4
    assert waits[1] - waits[0] == 2 * 2                          # are the pixels and is the gradient fit?
    assert {*products} == {torch.bfloat16} and len(products) == loss.call_count
    assert {call.args[0].dtype for call in loss.call_args_list} == {torch.float32}


@every_script
def test_what_is_logged_is_the_mean_over_images_without_the_penalty_which_is_in_the_gradients(script):
    """Of batches of 8 and 4 images, without an attack; [F] of Binary-Relax weighs 8 + 1."""
    args, model = digits_args(script, "--epsilon 0 --num-steps 0"), resnet().train()
    w, batches = model.linear.weight, [(torch.rand(n, 1, 8, 8), torch.arange(n) % 10) for n in (8, 4)]
    logits = [model(x) for x, _ in batches]
    more = dict(penalty=lambda: 1000 + 3 * w.square().sum()) if script in (cstar, admm_prune) else {}
    if more:                                                     # of the second batch
        loss = F.cross_entropy(logits[1], batches[1][1]) + more["penalty"]()
        gradient, = torch.autograd.grad(loss, w, retain_graph=True)
    found = script.train_epoch(model, batches, *sgd(model.parameters(), 0.0), args, **more)
    assert not more or torch.allclose(w.grad, gradient, atol=1e-5)
    logits, y = torch.cat(logits), torch.cat([y for _, y in batches])
    loss, right = F.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).double().mean().item()
    assert found["loss"] == pytest.approx(loss * (9 if script is binary_relax else 1), rel=1e-4)
    assert found["train_robust_acc"] == pytest.approx(right)


@pytest.mark.parametrize("script, more", [*((s, "--finetune-lr 0.03") for s in SCRIPTS), (binary_relax, "")])
def test_rates_of_every_phase_rise_to_their_peak_and_fall_to_zero(script, more, tmp_path, monkeypatch):
    """Phases of 1, 2 and 3 epochs of 4 steps; Binary-Relax by default has one cycle for the last two."""
    def make_optimizer(model, *args, **more):
        optimizer, schedule = common.make_optimizer(model, *args, **more)
        rates.append([])
        optimizer.register_step_pre_hook(lambda o, *_, own=rates[-1]: (
            own.append(o.param_groups[0]["lr"]) or momenta.append(o.param_groups[0]["momentum"])))
        return optimizer, schedule
    rates, momenta = [], []
    monkeypatch.setattr(script, "make_optimizer", make_optimizer)
    flags = f"--pretrain-epochs 1 --{PHASE[script]}-epochs 2 --finetune-epochs 3 --num-steps 0"
    tiny(tmp_path / "run", flags, f"--{PHASE[script]}-lr 0.07", more, script=script)
    steps, peaks = ([4, 8, 12], [0.1, 0.07, 0.03]) if more else ([4, 20], [0.1, 0.07])
    assert [len(own) for own in rates] == steps and set(momenta) == {0.9}
    for own, peak in zip(rates, peaks):
        assert 0.85 * peak < max(own) <= peak and own[-1] < 0.25 * peak


# ---------------------------------------------------------------- evaluation
SETTINGS = dict(epsilon=0.2, step_size=0.2, num_steps=20)


def test_autoattack_gets_gradients_that_it_can_view_flat_and_what_it_breaks_is_counted(monkeypatch):
    """It calls grad.view(N, -1), which fails on a gradient of several channels that is channels last."""
    def attack(self, x, y, batch_size):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(self.model(leaf).sum(), leaf)[0].view(len(x), -1)
        seen.append((x.shape, self.apgd_targeted.n_target_classes, self.fab.n_target_classes))
        assert (self.epsilon, self.apgd.eps, self.norm, self.seed) == (0.1, 0.1, "Linf", 3)
        return x, (y + broken) % 5
    pyautoattack, seen = pytest.importorskip("pyautoattack"), []
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", attack)
    model = resnet(channels=3, classes=5).eval().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    y = model(common.to_float(images)).argmax(1)
    for broken in (torch.zeros(4, dtype=torch.bool), torch.arange(4) < 1):
        accuracy = 100 - 25 * int(broken.sum())
        assert judges.autoattack(model, (images, y), epsilon=0.1, seed=3) == (accuracy, "standard")
    wrong = (y + (torch.arange(4) > 2)) % 5                      # what it calls right is checked
    assert judges.autoattack(model, (images, wrong), epsilon=0.1, seed=3) == (50.0, "standard")
    assert seen == [(images.shape, 4, 4)] * 3
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    noisy = Wrapped(model, lambda inner, x: inner(x) + 1e-3 * torch.randn(len(x), 5))
    assert judges.autoattack(noisy, (images, y), epsilon=0.1, seed=3)[1] == "rand"


def test_evaluate_is_near_autoattack(digits):
    def survivors(images, attack):
        judge = pyautoattack.AutoAttack(model, eps=0.2, version="custom", attacks=[attack], seed=0)
        judge.apgd_targeted.n_target_classes = 3
        judge.apgd.n_iter = judge.apgd_targeted.n_iter = 40
        x_adv = judge.run_standard_evaluation(common.to_float(images[0]), images[1], batch_size=100)[0]
        right = model(x_adv).argmax(1) == images[1]
        return [t[right] for t in images]
    pyautoattack = pytest.importorskip("pyautoattack")
    model, images = common.load_model(SHIPPED / "model.pt"), [t[:50] for t in digits.test]
    ours = common.evaluate(model, images, epsilon=0.2, step_size=0.2, num_steps=50)["robust_acc"] / 2
    ce = survivors(images, "apgd-ce")
    left = len(survivors(ce, "apgd-t")[1])
    assert 25 < left <= len(ce[1]) and abs(ours - left) <= 1, (ours, len(ce[1]), left)          # images of 50


def test_pgds_annealed_steps_are_their_formulas_and_evaluate_counts_every_iterate(robust, digits):
    images = [t[:250] for t in digits.test]                      # one batch; some are wrong when clean
    robust = Wrapped(copy.deepcopy(robust).double(), lambda model, x: model(x.double()))
    generator, same = (torch.Generator().manual_seed(0) for _ in range(2))
    x, y = common.to_float(images[0]), images[1]
    survived, before = robust(x).argmax(1) == y, None
    assert not survived.all()
    for kind in ("ce", "margin", "ce"):                          # the same attack, written plainly
        x_adv = (x + 0.2 * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
        for step in [0.2 * 10 ** (-t / 19) for t in range(20)] + [None]:
            x_adv.requires_grad_()
            logits = robust(x_adv)
            survived &= logits.argmax(1) == y
            if step:
                loss = F.cross_entropy(logits, y) if kind == "ce" else common.margin_loss(logits, y).sum()
                gradient, = torch.autograd.grad(loss, x_adv)
                now = x_adv.detach()
                new = torch.clamp(now + step * gradient.sign(), x - 0.2, x + 0.2).clamp(0, 1)
                if step < 0.2:
                    new = now + 0.75 * (new - now) + 0.25 * (now - before)
                before, x_adv = now, torch.clamp(new, x - 0.2, x + 0.2).clamp(0, 1)
        ours = common.pgd(robust, x, y, 0.2, 0.2, 20, loss=kind, generator=same, anneal=True)
        assert ((ours - x_adv).abs() > 1e-6).double().mean() < 0.01      # signs of gradients near 0
    found = common.evaluate(robust, images, **SETTINGS, restarts=3, losses=["ce", "margin"])
    assert found["robust_acc"] == common.per_cent(survived)


def test_evaluate_counts_the_clean_image_and_the_last_iterate():
    """Class 1 where the pixel is above one half: one image is wrong, one breaks at the step, one stays."""
    model, y = linear(STEP, 0.5, 0.0), torch.tensor([1, 1, 1])
    x = torch.tensor([100, 140, 200], dtype=torch.uint8).view(3, 1, 1, 1)
    found = common.evaluate(model, (x, y), epsilon=0.1, step_size=0.1, num_steps=1, random_start=False)
    assert (found["clean_acc"], found["robust_acc"]) == (66.667, 33.333)
    assert [found["clean_ci"], found["robust_ci"]] == [common.interval(100 * k / 3, 3) for k in (2, 1)]
    once = common.evaluate(model, (x, y), epsilon=0.1, step_size=0.1, num_steps=1, restarts=1)
    assert once["attack"]["losses"] == ["ce"]
    many = x[1:2].expand(40, 1, 1, 1), y[:1].expand(40)          # some break where the attack begins
    found = common.evaluate(model, many, epsilon=0.1, step_size=0.1, num_steps=1)
    assert (found["clean_acc"], found["robust_acc"]) == (100, 0)


def test_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    assert str(common.interval(0, 36)[0]) == "0.0"               # not -0.0
    for k, n in ((0, 40), (13, 40), (40, 40), (733, 1000)):
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert common.interval(100 * k / n, n) == pytest.approx([100 * p for p in theirs], abs=0.006)
    for n, alpha in ((10, 0.05), (100, 0.001), (10000, 0.001), (100000, 0.01)):
        for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):
            theirs = stats.beta.ppf(alpha, count, n - count + 1) if count else 0.0
            assert judges.clopper_pearson(count, n, alpha) == pytest.approx(theirs, abs=1e-9)


class Wrapped(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model, x)


def test_sanity_flags_are_silent_on_honest_networks_and_transfer_is_weaker_than_pgd(robust, standard, digits):
    for model in (robust, standard):
        assert common.sanity_flags(model, digits.test, **SETTINGS) == []
    white = common.evaluate(robust, digits.test, **SETTINGS)["robust_acc"]
    assert 40 < white < judges.transfer(robust, standard, digits.test, **SETTINGS) - 5
    assert judges.transfer(robust, robust, digits.test, **SETTINGS) == pytest.approx(white, abs=4)
    noisy = Wrapped(robust, lambda f, x: f(x + 0.1 * torch.randn_like(x))).eval()
    flag, = common.sanity_flags(noisy, digits.test, epsilon=0.001, step_size=0.0005, num_steps=3, eot=2)
    images, attack = [t[:60] for t in digits.test], dict(epsilon=0.2, step_size=0.05, num_steps=3, eot=2)
    assert flag.startswith("random output")
    hits = 0.6 * judges.transfer(noisy, noisy, images, **attack)
    assert abs(hits - round(hits)) > 0.05                            # of 60, by the mean of draws, not by one


@pytest.mark.parametrize("expected, change", [
    ("zero gradients", lambda model, x: 1e4 * model(x)),
    ("zero gradients", lambda model, x: model((x * 4).round() / 4)),
    ("random output", lambda model, x: model(x + 0.15 * torch.randn_like(x))),
    ("batch-dependent", lambda model, x: model(x) + 0.01 * x.mean() * torch.arange(10)),
    ("one class for all", lambda model, x: model(x) + 1e3 * F.one_hot(torch.tensor(3), 10)),
    ("probabilities", lambda model, x: model(x).softmax(1))])
def test_sanity_flags_catch_masked_networks(standard, digits, expected, change):
    flags = common.sanity_flags(Wrapped(standard, change), digits.test, **SETTINGS)
    assert any(expected in flag for flag in flags), flags
    if expected == "one class for all":                          # and so is the test set
        images = [t[digits.test[1] == 3] for t in digits.test]
        found = common.sanity_flags(Wrapped(standard, change), images, **SETTINGS)
        assert not any(expected in flag for flag in found)
    if expected == "zero gradients":                             # masking: what PGD misses others find
        assert any("stronger" in flag or "epsilon 1" in flag for flag in flags), flags


def test_sanity_flags_rise_at_their_thresholds(digits, monkeypatch):
    model = common.load_model(SHIPPED / "model.pt")
    images, attack = [t[:100] for t in digits.test], SETTINGS | dict(num_steps=5)
    light = common.to_float(images[0]).mean((1, 2, 3))
    for share, flagged in ((0.88, True), (0.92, False)):         # gradients vanish on 12 or 8 % of the images
        cut = light.quantile(share)
        hides = Wrapped(model, lambda f, x: f(torch.where(x.mean((1, 2, 3), True) > cut, x.detach(), x)))
        flags = " ".join(common.sanity_flags(hides, images, **attack))
        assert ("zero gradients" in flags) == flagged and "epsilon 1 leaves" in flags, flags
    for step_size, num_steps, words in ((0.15, 1, ["FGSM", "not", "random"]), (0.1, 4, ["FGSM", "not"])):
        flags = common.sanity_flags(model, digits.test, epsilon=0.2, step_size=step_size, num_steps=num_steps)
        assert sorted(flag.split()[0] for flag in flags) == words, flags         # gaps of 3.6 to 10 points
    for n, lost, flagged in ((100, 3, False), (100, 4, True), (250, 5, False), (250, 6, True)):
        def first(model, images, generator, *, epsilon, num_steps, **attack):
            assert len(images[1]) == n                           # of all no more than 250
            return 999 * (torch.arange(n) < (n // 2 - lost * (num_steps == 10)) * (epsilon < 1))
        monkeypatch.setattr(common, "first_broken_iterate", first)   # twice the steps break `lost` more
        flags = common.sanity_flags(model, [t[:n % 250 or 360] for t in digits.test], **attack)
        assert [flag.split(":")[0] for flag in flags] == ["not converged"] * flagged


def test_evaluate_of_a_random_network_is_repeatable_and_takes_the_losses_in_turn(robust, digits, monkeypatch):
    model = Wrapped(robust, lambda inner, x: inner(x + 0.1 * torch.randn_like(x)))
    images, state = [t[:40] for t in digits.test], torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(common, "pgd", pgd := Mock(wraps=common.pgd))
        first, second = (common.evaluate(model, images, **SETTINGS, eot=2, seed=3, restarts=3)
                         for _ in range(2))
    found = [tuple(call.kwargs[k] for k in ("loss", "eot", "anneal")) for call in pgd.call_args_list]
    assert found == [("ce", 2, True), ("margin", 2, True), ("ce", 2, True)] * 2
    assert first["attack"] | dict(losses=["ce", "margin"], eot=2, seed=3) == first["attack"]
    assert first == second and first["attack"]["draws"] == 10 and torch.equal(state, torch.get_rng_state())
    still = SETTINGS | dict(epsilon=0, num_steps=1)              # no attack: both are right in the mean
    still = [common.evaluate(model, images, **still, eot=1, seed=seed) for seed in range(12)]
    gaps = [result["clean_acc"] - result["robust_acc"] for result in still]
    assert min(gaps) < 0 < max(gaps) and abs(sum(gaps)) < 12 * 0.8
    for key in ("clean_acc", "robust_acc"):                      # of 40 images in 10 passes
        assert any(result[key] % 2.5 for result in still)
    others = [common.evaluate(model, images, **SETTINGS, eot=2, seed=seed, restarts=3) for seed in (4, 5, 6)]
    assert any(other["robust_acc"] != first["robust_acc"] for other in others)


def test_noisy_verdict_is_that_of_the_worst_restart(monkeypatch):
    """Of a linear network with little noise; the first restart breaks both images, the second none, the
    third one of them, half of the time."""
    def attack(model, x, *_, **more):
        return x - next(shifts)
    shifts = iter([0.2, 0.0, 150 / 255 - 0.5])
    noisy = Wrapped(linear(STEP, 0.5, 0.0), lambda inner, x: inner(x) + 1e-3 * torch.randn(len(x), 2))
    images = torch.tensor([150, 160], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([1, 1])
    monkeypatch.setattr(common, "pgd", attack)
    found = common.evaluate(noisy, images, epsilon=0.2, step_size=0.2, num_steps=1, restarts=3)
    assert (found["clean_acc"], found["robust_acc"], found["attack"]["draws"]) == (100, 0, 10)


def test_evaluating_on_the_cpu_puts_a_gpus_random_numbers_back(robust, monkeypatch):
    kept, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: kept.append(devices) or fork([]))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3 if used else pytest.fail("none is used"))
        with common.evaluating(robust):
            pass
    assert [*map(list, kept)] == [[], [0, 1, 2]]


def test_evaluate_takes_bytes_as_labels_and_refuses_what_is_no_image_label_or_number(robust, digits):
    x, y = images = [t[:60] for t in digits.test]
    model = copy.deepcopy(robust).train()
    as_bytes = common.evaluate(model, (x, y.to(torch.uint8)), **SETTINGS)
    assert as_bytes == common.evaluate(robust, images, **SETTINGS) and as_bytes["robust_acc"] < 100
    exported = torch.export.export(copy.deepcopy(robust).eval(), (common.to_float(x[:2]),), dynamic_shapes=(
        {0: torch.export.Dim.DYNAMIC},)).module()                # its eval() raises
    bare = Wrapped(torch.nn.Identity(), lambda _, x: x.flatten(1)[:, 20:30])
    assert common.evaluate(exported, images, **SETTINGS)["clean_acc"] == as_bytes["clean_acc"]
    assert common.evaluate(bare, images, **SETTINGS)["images"] == 60
    for wrong in ((common.to_float(x), y), (x[0], y), (x, y + 1), (x, y - 1), (x, y[1:]), (x, y[:, None]),
                  (x, y.float()), (x, y > 4)):
        for judge in (common.evaluate, common.sanity_flags):
            fails(1, "uint8|10 classes", judge, model, wrong, **SETTINGS)
    for wrong in (dict(restarts=0), dict(losses=[]), dict(losses="ce")):         # nothing would be attacked
        fails(1, "needs a restart and", common.evaluate, model, images, **SETTINGS, **wrong)
    for wrong in (lambda f, x: f(x)[:, 0], lambda f, x: (f(x),)):
        fails(1, "logits, a tensor", common.evaluate, Wrapped(robust, wrong), images, **SETTINGS)
    for epsilon in (8, -0.1, math.nan):
        fails(1, "write 8 / 255", common.pgd, model, common.to_float(x), y, epsilon, 0.1, 1)
    for pixel in (math.nan, -0.01, 255.0):
        x_wrong = common.to_float(x)
        x_wrong[3, 0, 2, 2] = pixel
        fails(1, "^a pixel is not in", common.pgd, model, x_wrong, y, 0.2, 0.05, 3)
    for value in (math.nan, math.inf):
        broken = Wrapped(robust, lambda f, x: f(x) * torch.where(torch.arange(10) == 3, value, 1.0))
        fails(1, "logits are not finite", common.evaluate, broken, images, **SETTINGS)
        fails(1, "gradient is not finite", common.pgd, broken, common.to_float(x), y, 0.2, 0.05, 3)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- CSTAR
SHAPES = [((6, 5, 3, 3), (2, 3)), ((4, 7, 3, 3), (3, 2)), ((5, 6, 1, 1), (2,)), ((8, 5), (3,))]


@pytest.mark.parametrize("shape, rank", SHAPES)
def test_cstar_projection_has_the_rank_is_idempotent_and_within_the_bounds_of_hosvd(shape, rank):
    """Both unfoldings leave out the tails of their spectra: the error is one of them at least, their sum at
    most; of a matrix exactly its own. And the table of errors is that of all projections."""
    w = conv_weight(*shape)
    tails = [(torch.linalg.svdvals(w.transpose(0, mode).flatten(1))[r:] ** 2).sum().item()
             for mode, r in enumerate(rank)]
    for hooi in (0, 3):
        p = cstar.project(w, rank, hooi)
        ranks = [torch.linalg.matrix_rank(cstar.unfold(p, mode)).item() for mode in (0, 1)]
        assert ranks == list(rank if len(rank) == 2 else rank * 2)
        assert (cstar.project(p, rank, hooi) - p).abs().max() < 1e-9
        error = (w - p).square().sum().item()
        assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9
        assert w.square().sum() == pytest.approx(p.square().sum().item() + error, rel=1e-9)
    table = cstar.error_table(w)
    for pair in np.ndindex(*table.shape):
        p = cstar.project(w, [i + 1 for i in pair[:len(rank)]])
        assert table[pair].item() == pytest.approx((w - p).square().sum().item(), abs=1e-9)
    assert torch.equal(w, conv_weight(*shape)) and torch.allclose(p, w)      # as it was, and at full rank
    fails(1, "not finite", cstar.project, w * math.nan, rank)


@pytest.mark.parametrize("shape, rank", SHAPES[:2])
def test_cstar_projection_is_near_the_best_that_tensorly_finds(shape, rank):
    def theirs(**more):
        (core, factors), _ = partial_tucker(w.numpy(), rank=list(rank), modes=[0, 1], **more)
        return np.square(w.numpy() - multi_mode_dot(core, factors, modes=[0, 1])).sum()
    partial_tucker = pytest.importorskip("tensorly.decomposition").partial_tucker
    from tensorly.tenalg import multi_mode_dot
    w = conv_weight(*shape)
    best = min(theirs(init="random", random_state=seed) for seed in range(50))
    error = [(w - cstar.project(w, rank, hooi)).square().sum().item() for hooi in (0, 50)]
    assert 0.999 * best <= error[1] <= error[0] <= 2 * best
    assert error[1] <= 1.05 * best and error[1] <= 1.01 * theirs(init="svd")


def test_cstar_ranks_are_near_an_exhaustive_search():
    def state(name, rank):
        w = weights[name]
        error = (w - cstar.project(w, rank)).square().sum() / w.square().sum() if rank else torch.zeros(())
        return cstar.cost(w.shape, rank), error.item()
    weights = dict(a=10 * conv_weight(4, 3, 3, 3, seed=1), b=conv_weight(5, 4, 3, 3, seed=2),
                   c=conv_weight(6, 5, seed=3))
    for w in weights.values():                                   # singular values fall
        w /= torch.arange(1, len(w) + 1).view(-1, *[1] * (w.dim() - 1))
    def total_of(ranks):
        return [sum(values) for values in zip(*(state(*item) for item in ranks.items()))]
    options = [[state(name, [i + 1 for i in index]) for index in np.ndindex(cstar.full_rank(w))]
               + [state(name, None)] for name, w in weights.items()]
    picks = [[sum(values) for values in zip(*pick)] for pick in itertools.product(*options)]
    total = sum(w.numel() for w in weights.values())
    largest_step = max(c for option in options for c, _ in option) / 4
    least = sum(option[0][0] for option in options)
    for budget in range(math.ceil(least + largest_step), total, total // 12):
        ranks = cstar.choose_ranks(weights, budget)
        assert cstar.choose_ranks(dict(reversed(weights.items())), budget) == ranks
        cost, error = total_of(ranks)
        assert cost <= budget and total_of(cstar.choose_ranks(weights, budget, "uniform"))[0] <= budget
        # What nesting may cost: the step that does not fit is left out, though a smaller one elsewhere would.
        assert error <= 1.05 * min(e for c, e in picks if c <= budget - largest_step) + 1e-9
    assert cstar.choose_ranks(weights, total) == dict.fromkeys(weights)
    assert cstar.choose_ranks(weights, total, "uniform") == dict.fromkeys(weights)   # as it costs no more


def test_cstar_ranks_of_odd_layers_and_by_one_fraction_of_all():
    chain = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
    assert [*cstar.factorisable(nn.Sequential(*chain))] == ["2"]     # not the first, the last, nor groups
    attention = nn.Sequential(chain[0], nn.MultiheadAttention(4, 1), chain[3])       # it reads the weight
    fails(2, "nothing can be factorised", cstar.budget_of, attention, 2)
    empty = dict(a=torch.zeros(6, 5, 3, 3), b=conv_weight(6, 5, 3, 3))
    assert cstar.choose_ranks(empty, 290) == dict(a=(1, 1), b=None)
    weights = dict(a=conv_weight(40, 60, 3, 3), b=conv_weight(100, 20))
    fractions = [r / n for name, rank in cstar.choose_ranks(weights, 14000, "uniform").items()
                 for r, n in zip(rank, cstar.full_rank(weights[name]))]
    assert max(fractions) - min(fractions) < 0.06 and min(fractions) > 0.55


def test_cstar_chain_lowers_the_rank_that_loses_less_for_the_cost_it_saves():
    w = conv_weight(6, 9, 3, 3) * torch.arange(1, 7).view(-1, 1, 1, 1) ** -1.5
    table, states, lowered = cstar.error_table(w) / w.square().sum(), cstar.chain(w, (2, 3))[::-1], set()
    def loss(rank, below):
        rise = table[below[0] - 1, below[1] - 1] - table[rank[0] - 1, rank[1] - 1]
        return rise / (cstar.cost(w.shape, rank) - cstar.cost(w.shape, below))
    assert states[0] == (w.numel(), 0.0, None) and states[-1][2] == (2, 3)
    for (_, _, rank), (_, _, below) in itertools.pairwise(states[1:]):
        options = [(rank[0] - 1, rank[1])] * (rank[0] > 2) + [(rank[0], rank[1] - 1)] * (rank[1] > 3)
        assert below == min(options, key=lambda option: loss(rank, option))
        lowered.add((len(options), options.index(below)))
    assert {(2, 0), (2, 1)} <= lowered


@pytest.mark.parametrize("arch, width, budget, rule", [
    ("resnet18", 16, "parameters", "hull"), ("wrn28_4", 16, "macs", "hull"),
    *itertools.product(("resnet18", "vgg16", "wrn28_4", "lenet"), [4], ("parameters", "macs"), ["hull"]),
    *itertools.product(("resnet18", "lenet"), [4], ("parameters", "macs"), ["uniform"])])
def test_cstar_budget_is_exact_and_ranks_never_grow_with_the_ratio(arch, width, budget, rule, monkeypatch):
    def size_of(model):
        return common.count_macs(model, network) if places else sum(p.numel() for p in model.parameters())
    torch.manual_seed(0)
    network = dict(channels=1 if arch == "lenet" else 3, size=(32, 32))
    model, before = common.build_network(arch, width, classes=10, **network), None
    layers = cstar.factorisable(model)
    weights = {n: m.weight.detach() for n, m in layers.items()}
    for w in weights.values():                                   # power-law spectra in both modes
        s, c = (torch.arange(1, n + 1).view(-1, *[1] * (w.dim() - 1 - i)) for i, n in enumerate(w.shape[:2]))
        w *= s ** -0.7 * c ** -0.4
    places = cstar.positions(model, network) if budget == "macs" else None
    total, each, begin = size_of(model), places or dict.fromkeys(weights, (1, 1)), time.process_time()
    path = list(cstar.rank_path(weights, each, 1.0 if rule == "uniform" else cstar.FLOOR))
    assert time.process_time() - begin < 20
    monkeypatch.setattr(cstar, "rank_path", lambda *_: path)     # it is the same for all ratios
    for ratio in (2, 3, 4, 8, 16, 32, 48, 64):
        try:
            left = cstar.budget_of(model, ratio, places, total if places else 0)
        except common.UsageFault:
            assert before and (ratio > 4 or places)
            break
        ranks, thin = cstar.choose_ranks(weights, left, rule, places), copy.deepcopy(model)
        used = sum(cstar.cost(w.shape, ranks[name], each[name]) for name, w in weights.items())
        for name, rank in ranks.items():
            thin.set_submodule(name, cstar.factor_layer(layers[name], rank) if rank else layers[name])
        size = size_of(thin)
        assert size <= total / ratio and size == int(total // ratio) - left + used
        assert size * ratio > 0.98 * total or arch == "lenet"    # of which one rank is a large step
        full = {n: ranks[n] or tuple(w.shape[:2]) for n, w in weights.items()}
        assert not before or all(a <= b for n in full for a, b in zip(full[n], before[n]))
        before = full


def test_cstar_ranks_rise_together_to_the_floor_rounded_up_and_are_below_it_only_where_the_budget_is():
    torch.manual_seed(0)
    model = common.build_network("lenet", 4, 1, 10, (28, 28))
    weights = {n: m.weight.detach() for n, m in cstar.factorisable(model).items()}
    convolution, linear = weights
    weights[linear] *= torch.arange(1, 257)[:, None] ** -2.0     # one rank holds most: the hull starves it
    loose, tight = (cstar.choose_ranks(weights, cstar.budget_of(model, ratio)) for ratio in (14, 32))
    assert loose[linear] == (8,) and loose[convolution] is None  # 3 % of 256, rounded up
    assert 1 < tight[linear][0] < 8 and tight[convolution] == (1, 1)
    largest = float(re.search(r"to ([\d.]+),", fails(2, "from 1 to", cstar.budget_of, model, 1000))[1])
    assert cstar.budget_of(model, largest) >= 0
    fails(2, "from 1 to", cstar.budget_of, model, largest + 0.02)
    weights = dict(a=conv_weight(70, 5), b=1e-3 * conv_weight(34, 40, 3, 3), c=conv_weight(6, 6, 3, 3))
    path = list(cstar.rank_path(weights, dict.fromkeys(weights, (1, 1)), cstar.FLOOR))
    least = dict(a=(1,), b=(2, 2), c=(1, 1))                     # 3 % of 5, of 34 and 40, of 6, rounded up
    assert path[:2] == [("b", (1, 2)), ("b", (2, 2))]
    assert all(min(np.subtract(rank or least[name], least[name])) >= 0 for name, rank in path[2:])


@pytest.mark.parametrize("layer, rank, size", [
    (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (3, 4), 9),
    (nn.Conv2d(6, 8, 3, dilation=2, padding=2, padding_mode="circular"), (2, 5), 9),
    (nn.Conv2d(6, 8, 1, stride=2), (4,), 9),
    (nn.Conv2d(6, 8, (1, 3), padding=(0, 1)), (3, 3), 9), (nn.Linear(6, 8), (3,), 0)])
def test_cstar_factorised_layer_equals_the_projected_one(layer, rank, size):
    x = torch.randn(3, 6, size, size) if size else torch.randn(3, 6)
    model = nn.Sequential(copy.deepcopy(layer))
    thin = cstar.factorise_(copy.deepcopy(model), {"0": rank})
    model[0].weight.data = cstar.project(model[0].weight.data, rank)
    assert isinstance(thin[0], nn.Sequential) and torch.allclose(thin(x), model(x), atol=1e-5, rtol=1e-5)
    count = cstar.cost(layer.weight.shape, rank) + (layer.bias is not None) * 8
    assert sum(p.numel() for p in thin.parameters()) == count


def test_cstar_sweeps_are_those_of_every_projection_and_of_the_cut_and_rho_has_a_cap(tmp_path, monkeypatch):
    """Two layers: their tables of errors, which need none; Z at first and at the update; the factors."""
    monkeypatch.setattr(cstar, "tucker2", tucker2 := Mock(wraps=cstar.tucker2))
    flags = "--ratio 2 --admm-epochs 1 --hooi 2 --momentum 0 --train-images 64 --arch lenet --num-steps 0"
    found = tiny(tmp_path, UNTRAINED, flags)
    sweeps = [(*call.args, 0)[2] for call in tucker2.call_args_list]
    assert sweeps == [0] * 2 + [2] * 6 and None not in found["ranks"].values()
    assert found["rho"] == pytest.approx(1 / 0.1)                # 3 / (rate * 2 steps) would diverge


def test_cstar_batch_norm_is_the_average_over_batches_of_attacked_images(tmp_path, monkeypatch):
    """Attacked by an attack that makes all images black: the first convolution then gives zeros. It sees
    the statistics of clean images."""
    model = nn.Sequential(nn.BatchNorm2d(2))
    batches = [(torch.randn(8, 2, 3, 3) + i, None) for i in range(4)]
    cstar.reestimate_batchnorm_(model, batches, 3)
    average = torch.stack([x.mean((0, 2, 3)) for x, _ in batches[:3]]).mean(0)
    assert torch.allclose(model[0].running_mean, average, atol=1e-6) and model[0].momentum == 0.1
    modes = []
    def blacken(model, x, *_):
        modes.append((model.training, bool(model.bn1.running_mean.any())))
        return 0 * x
    for pgd, black in ((common.pgd, False), (blacken, True)):
        monkeypatch.setattr(cstar, "pgd", pgd)
        tiny(tmp_path / str(black), UNTRAINED, "--pretrain-epochs 1")
        mean = common.load_model(tmp_path / str(black) / "model.pt").bn1.running_mean
        assert (mean.abs().max() == 0) == black
    assert modes == [(False, False)] * 4 + [(False, True)] * 4   # 4 batches of training, 4 of statistics


# ---------------------------------------------------------------- ADMM pruning
SCHEMES = ["filter", "column", "irregular"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ratio", [1, 1.1, 4 / 3, 2, 16 / 5, 10, 16, 10000])
def test_admm_projection_keeps_ceil_n_over_ratio_units_of_most_energy_the_first_of_equal_ones(scheme, ratio):
    others = (torch.full((9, 9), 1e-30), 1e-30 * torch.arange(81.0).view(9, 9), torch.randn(6, 27).round(),
              conv_weight(4, 3, 2, 1), conv_weight(2, 5))
    for w in (torch.ones(64, 3, 3, 3), torch.zeros(7, 5), *others):
        before, squares = w.clone(), w.flatten(1).double().square()
        energy = dict(filter=squares.sum(1), column=squares.sum(0), irregular=squares.flatten())[scheme]
        mask, n = admm_prune.choose_masks({0: w}, scheme, ratio)[0], len(energy)
        projected = admm_prune.project(w, mask)
        whole_units = {"filter": mask.flatten(1).any(1), "column": mask.flatten(1).any(0),
                       "irregular": mask.flatten()}[scheme]
        kept = int(whole_units.sum())
        assert kept == -(-n // Fraction(ratio).limit_denominator(1000))
        assert int(mask.sum()) * n == kept * w.numel()
        lost, least = (w - projected).double().square().sum(), energy.sort().values[:n - kept].sum()
        assert lost.item() == pytest.approx(least.item(), rel=1e-9, abs=1e-70)           # it is the nearest
        assert torch.equal(admm_prune.choose_masks({0: -8 * projected}, scheme, ratio)[0], mask)
        assert torch.equal(projected, w * mask) and torch.equal(w, before)
        assert projected.data_ptr() != w.data_ptr()
        assert len(w.unique()) > 1 or whole_units[:kept].all()
    fails(1, "not finite", admm_prune.choose_masks, {0: torch.full((3, 3), math.nan)}, scheme, ratio)


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


@pytest.mark.parametrize("arch, channels, size, grouped", [
    ("lenet", 1, 12, False), ("lenet", 3, 16, False), ("vgg16", 3, 32, False), ("resnet18", 3, 16, False),
    ("resnet18", 3, 16, True), ("wrn28_4", 2, 8, False), ("wrn28_4", 2, 8, True)])
def test_admm_smaller_network_equals_the_masked_one(arch, channels, size, grouped):
    model = shaken(arch, 2, channels, size)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 0.1, 0.3                         # a fork's
    chosen = filter_masks(model, 2, grouped)
    for names, _, _ in common.channel_groups(model) if grouped else ():      # one mask, by the joint norm
        joint = sum(model.get_submodule(name).weight.flatten(1).square().sum(1) for name in names)
        best = set(joint.topk(len(joint) // 2).indices.tolist())
        assert all(set(chosen[name].flatten(1).any(1).nonzero().flatten().tolist()) == best for name in names)
    masks = common.parameter_masks(model, chosen, True)
    for writers, norms, _ in common.channel_groups(model):       # of a sum: alive where one writer is
        alive = torch.stack([chosen[name].flatten(1).any(1) for name in writers]).any(0)
        assert all(torch.equal(masks[f"{norm}.{p}"], alive) for norm in norms for p in ("weight", "bias"))
    admm = admm_prune.ADMM(model, lambda _: masks, rho=1.0)      # pulls at all that the cut sets to zero
    pulls = dict(zip(masks, torch.autograd.grad(admm.penalty(), [*map(model.get_parameter, masks)])))
    for name, p in model.named_parameters():
        assert name not in masks or torch.allclose(pulls[name], p * ~masks[name])
    constants = copy.deepcopy(model).eval()                      # of dead filters, which must go with them
    common.apply_masks_(constants, {name: mask for name, mask in masks.items() if mask.dim() > 1})
    common.apply_masks_(model, masks)
    small, left = common.remove_filters_(copy.deepcopy(model).eval(), masks)
    assert not any(m.training for m in small.modules())
    assert {m.momentum for m in small.modules() if isinstance(m, nn.BatchNorm2d)} <= {0.3}
    x = torch.rand(6, channels, size, size).double()
    assert (small(x) - constants(x)).abs().max() > 1e-3 * constants(x).abs().max()
    for training in (False, True):                               # with running and with batch statistics
        full = copy.deepcopy(model).train(training)(x)
        assert (small.train(training)(x) - full).abs().max() <= 1e-12 * full.abs().max()
    half = [p.shape for p in shaken(arch, 1, channels, size).state_dict().values()]
    whole = all(mask.all() for mask in left.values())
    assert whole == ([p.shape for p in small.state_dict().values()] == half)
    assert whole == (grouped or arch in ("lenet", "vgg16"))
    assert all((small.get_parameter(name)[~mask] == 0).all() for name, mask in left.items())


@pytest.mark.parametrize("script", [admm_prune, hydra_prune])
def test_filters_cut_from_a_pretrained_network_leave_nothing_in_a_residual_stream(script, finished, tmp_path):
    dense = finished[0] / "dense.pt"
    flags = f"--scheme filter --pretrain-epochs 0 --{PHASE[script]}-epochs 0 --finetune-epochs 0 --pretrained"
    tiny(tmp_path, flags, dense, script=script)
    assert same_weights(dense, tmp_path / "dense.pt") and not (tmp_path / "ticket.pt").exists()
    block = common.load_model(tmp_path / "model.pt").layer1[0]
    alive = block.conv2.weight.flatten(1).any(1)                 # others write the stream's other channels
    assert alive.sum() == 1 < len(alive)
    assert all(torch.equal(t != 0, alive) for t in (block.bn2.weight, block.bn2.bias))


def test_resized_layers_keep_what_is_no_size():
    layer = nn.Conv2d(4, 6, 3, 2, 2, dilation=2, padding_mode="circular", bias=False)
    small = common.resize_(nn.Sequential(copy.deepcopy(layer)), {"0.weight": torch.ones(3, 2, 3, 3)})[0]
    for name in ("stride", "padding", "dilation", "padding_mode", "bias"):
        assert getattr(small, name) == getattr(layer, name)
    assert str(small) == str(nn.Conv2d(2, 3, 3, 2, 2, dilation=2, padding_mode="circular", bias=False))
    assert (small(x := torch.rand(1, 2, 9, 9)) == F.conv2d(F.pad(x, (2,) * 4, mode="circular"), torch.ones(
        3, 2, 3, 3), stride=2, dilation=2)).all()


def test_filters_of_layers_without_a_mask_stay():
    model, x = shaken("resnet18", 1, 3, 16).eval(), torch.rand(3, 3, 16, 16).double()
    chosen = filter_masks(model, 2)
    kept = [chosen.pop(name) for name in ("conv1", "layer2.0.conv1")]
    masks = common.parameter_masks(model, chosen, filters=True)
    assert masks["conv1.weight"].all() and masks["bn1.bias"].all() and not all(mask.all() for mask in kept)
    common.apply_masks_(model, masks)
    wanted = model(x)
    small, _ = common.remove_filters_(model, masks)
    assert torch.allclose(small(x), wanted, atol=1e-12)
    assert small.layer2[0].conv1.out_channels == 8 and small.layer2[1].conv1.out_channels == 4


@pytest.mark.parametrize("hooi_or_scheme, growth, rhos", [
    (0, (), [0.7] * 3), (2, (), [0.7] * 3), ("irregular", (), [0.7] * 3),
    ("column", (3.0, 5.0), [2.1, 5.0, 5.0]), ("filter", (3.0, 0.5), [0.7] * 3)])
def test_admm_penalty_updates_and_residual_are_their_formulas(hooi_or_scheme, growth, rhos):
    """rho grows to its cap and is never lowered; the multiplier rho U is not changed by that."""
    layer = nn.Conv2d(4, 5, 3, bias=False).double()
    layer.weight.data = conv_weight(5, 4, 3, 3)
    if hooi_or_scheme in SCHEMES:
        choose = functools.partial(admm_prune.choose_masks, scheme=hooi_or_scheme, ratio=3)
        admm, project = admm_prune.ADMM(layer, choose, 0.7, *growth), lambda v: v * choose({0: v})[0]
    else:
        admm = cstar.ADMM({"weight": layer}, {"weight": (2, 2)}, 0.7, hooi_or_scheme)
        project = functools.partial(cstar.project, rank=(2, 2), hooi=hooi_or_scheme)
    assert torch.equal(admm.z["weight"], project(layer.weight)) and not admm.u["weight"].any()
    for seed, wanted in enumerate(rhos, 1):
        rho, z, u, w = admm.rho, admm.z["weight"], admm.u["weight"], layer.weight.detach().clone()
        gradient, = torch.autograd.grad(admm.penalty(), layer.weight)
        assert torch.allclose(gradient, rho * (w - z + u)) and not u.requires_grad and not z.requires_grad
        residual, *changed = np.atleast_1d(admm.update())
        new = admm.z["weight"]
        assert torch.allclose(new, project(w + u)) and torch.equal(layer.weight, w)      # CSTAR [F], ADMM [E]
        assert torch.allclose(admm.rho * admm.u["weight"], rho * (u + w - new))          # CSTAR [G], ADMM [F]
        assert admm.rho == pytest.approx(wanted)
        assert residual == pytest.approx(((w - new).norm() / w.norm()).item())
        moved = 100 * ((new != 0) ^ (z != 0)).double().mean().item()
        assert changed in ([], [pytest.approx(moved)])
        layer.weight.data += 0.1 * conv_weight(5, 4, 3, 3, seed=seed)


@pytest.mark.parametrize("script, scheme, objective", [
    *((admm_prune, scheme, "") for scheme in SCHEMES),
    *((hydra_prune, "irregular", objective) for objective in hydra_prune.OBJECTIVES),
    *((hydra_prune, "filter", objective) for objective in ("pgd", *hydra_prune.BOUNDED))])
def test_pruning_keeps_its_count_in_every_layer_and_writes_a_smaller_file(
        tmp_path, capsys, monkeypatch, script, scheme, objective):
    flags, run = f"--data-dir some --scheme {scheme}", tmp_path / "run"
    flags += f" --objective {objective} --arch cnn_small --width 8" if objective else ""
    flags += " --sigma 0.5" if objective == "smooth" else ""
    monkeypatch.setattr(hydra_prune, "verify", verify := Mock(wraps=hydra_prune.verify))
    monkeypatch.setattr(hydra_prune, "make_optimizer", optimizer := Mock(wraps=common.make_optimizer))
    result = tiny(run, flags, script=script, evaluate=True)
    dense, model = (common.load_model(run / name) for name in ("dense.pt", "model.pt"))
    for name, layer in script.prunable(dense, *[scheme] * bool(objective)).items():
        w = layer.weight
        units = dict(filter=len(w), column=w[0].numel(), irregular=w.numel())[scheme]
        kept = result["kept"][f"{name}.weight"]
        assert kept == -(-units // 4) * (w.numel() // units)
        assert scheme == "filter" or int(model.get_submodule(name).weight.count_nonzero()) == kept
    assert os.path.getsize(run / "model.pt") == result["bytes"] < 0.6 * result["dense_bytes"]
    assert result["nonzeros"] < 0.5 * result["dense_parameters"]
    if scheme == "filter":
        assert result["parameters"] < 0.5 * result["dense_parameters"] and result["macs_ratio"] > 1.5
    else:                                                        # strictly into the plain network
        dense.load_state_dict(model.state_dict())
    if objective:
        assert [call.args[5] for call in optimizer.call_args_list] == [objective in hydra_prune.BOUNDED] * 3
        radii = [call.args[2] for call in verify.call_args_list]
        assert radii == [result["args"]["epsilon"]] * 2          # of the dense network and of the compact one
        assert 0 <= result["verified_acc"] <= result["robust_acc"] <= result["clean_acc"]
        assert result["verified_ci"] == common.interval(result["verified_acc"], 40)
    assert ("train_noisy_acc" in log_of(run)[-2]) == (objective == "smooth")
    assert capsys.readouterr().out.splitlines()[-1].startswith("phase:final clean_acc:")


def phases_of(folder, script=cstar):
    phases = [line.get("phase") for line in log_of(folder)]
    return [phases.count(phase) for phase in ("pretrain", PHASE[script], "finetune")]


def test_admm_modes_spend_the_same_epochs_on_networks_of_one_size(tmp_path):
    results, flags = {}, TINY.replace("--ratio 4", "--arch lenet --width 4 --target-width 2")
    for mode, more, phases in (("admm", (), [2, 2, 2]), ("post", (), [2, 0, 4]), ("scratch", (), [6, 0, 0]),
                               ("ticket", ("--ticket", tmp_path / "admm/ticket.pt"), [0, 0, 6])):
        results[mode] = admm_prune.main(argv_of(flags, "--mode", mode, *more, "--output", tmp_path / mode))
        assert phases_of(tmp_path / mode) == phases
    assert len({r["parameters"] for r in results.values()}) == 1 == results["scratch"]["params_ratio"]
    assert results["ticket"]["dense"] == results["admm"]["dense"]
    rho = pytest.approx(3 * (1 - 0.9) / (0.1 / 2 * 4))           # three time constants in the epoch's 4 steps
    assert [results[mode]["rho"] for mode in ("admm", "post")] == [rho, None]
    args = Mock(rho=None, rho_growth=1.0, momentum=0.0, admm_lr=0.05, admm_interval=1)
    assert [admm_prune.first_rho(args, Mock(steps=lambda _: n)) for n in (1, 3, 60)] == [20, 20, 1]
    assert len({json.dumps(r["kept"]) for m, r in results.items() if m != "scratch"}) == 1


def test_admm_ticket_is_the_initial_network_cut_like_the_pruned_one(whole, tmp_path):
    path, initial = whole(admm_prune)[0] / "ticket.pt", resnet()
    ticket = common.read_model(path)[0]
    assert all(torch.equal(ticket["state"][k], v) for k, v in initial.state_dict().items())
    common.apply_masks_(initial, ticket["masks"])
    small, _ = common.remove_filters_(initial, ticket["masks"])
    run = functools.partial(tiny, tmp_path / "run", UNTRAINED, script=admm_prune)
    run(mode := "--mode ticket --ticket", path)
    cut = common.load_model(tmp_path / "run/model.pt").state_dict()
    assert all(torch.equal(cut[k], v) for k, v in small.state_dict().items())
    assert 0 < len(cut["layer1.0.conv1.weight"]) < len(ticket["state"]["layer1.0.conv1.weight"])
    fails(2, "--pretrained: .*ticket.pt holds ticket", run, "--pretrained", path)
    for other in ("--ratio 2", "--scheme column", "--width 2"):
        fails(2, "is not a ticket of", run, mode, path, other)
    shutil.copy(path, tmp_path / "ticket.pt")
    shutil.copy(path.with_name("model.pt"), tmp_path / "dense.pt")
    fails(2, "dense.pt beside it is not a dense network of", run, mode, tmp_path / "ticket.pt")
    tiny(tmp_path / "post", UNTRAINED, "--mode post", script=admm_prune)
    assert not (tmp_path / "post/ticket.pt").exists()            # a ticket is what ADMM chose


@pytest.mark.parametrize("script, flags, rho", [
    (cstar, "--pretrain-epochs 3", [0.75] * 2), (binary_relax, "--pretrain-epochs 3", []),
    (admm_prune, "--pretrain-epochs 3 --rho-growth 2 --admm-epochs 5 --admm-interval 2",
     [None, 0.75, None, 1.5, None]), (admm_prune, "--mode ticket --ticket", [])])
def test_radius_and_step_ramp_up_together_and_the_log_has_rho_and_residual_of_each_update(
        whole, tmp_path, monkeypatch, script, flags, rho):
    attacks, run = [], tmp_path / "run"
    more = [whole(admm_prune)[0] / "ticket.pt"] if "ticket" in flags else []
    monkeypatch.setattr(script, "pgd", lambda model, x, y, *attack: attacks.append(attack) or x)
    monkeypatch.setattr(script, "make_optimizer", make_optimizer := Mock(wraps=common.make_optimizer))
    tiny(run, "--ramp-epochs 2", flags, *more, script=script)
    rises = {cstar: [None, 0.0, None], admm_prune: [None, 0.2, None], binary_relax: [None, None]}[script]
    assert [call.kwargs.get("rise") for call in make_optimizer.call_args_list] == rises
    strengths = [row["strength"] for row in log_of(run) if "strength" in row]
    assert strengths[:3] == ([] if more else [0.5, 1, 1])
    rows = [row for row in log_of(run) if row.get("phase") == "admm"]
    assert [row["rho"] if "residual" in row else None for row in rows] == pytest.approx(rho)
    residuals = [None, *(row["residual"] for row in rows if "rho" in row)]
    assert common.read_file(run / "last.pt")["computed"].get("residual") == residuals[-1]
    assert attacks[:4] == [(0.1, 0.025, 2)] * 4                  # an epoch at half strength
    assert len(attacks) > 8 and set(attacks[4:]) == {(0.2, 0.05, 2)}
    if script is binary_relax:                                   # there over all phases
        attacks.clear()
        tiny(tmp_path / "long", "--pretrain-epochs 1 --ramp-epochs 5", script=script)
        assert [radius for radius, *_ in attacks[::4]] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])


def test_admm_cut_goes_by_the_weights_alone(tmp_path, monkeypatch):
    """[G] project(W), not project(W + U)."""
    def updated(admm):
        found = update(admm)
        held.update({name: w.detach().clone() for name, w in admm.weights.items()})
        admm.u = {name: u + torch.randn_like(u) for name, u in admm.u.items()}
        return found
    held, update = {}, admm_prune.ADMM.update
    monkeypatch.setattr(admm_prune.ADMM, "update", updated)
    tiny(tmp_path, UNTRAINED, "--admm-epochs 2 --num-steps 0 --scheme irregular", script=admm_prune)
    cut, wanted = common.load_model(tmp_path / "model.pt"), admm_prune.choose_masks(held, "irregular", 4)
    assert all(torch.equal(cut.get_parameter(name) != 0, mask) for name, mask in wanted.items())


def test_files_leave_zeros_out_and_give_them_back(tmp_path):
    path, entropy = tmp_path / "model.pt", -0.1 * math.log2(0.1) - 0.9 * math.log2(0.9)  # a plain map: 1
    network = dict(arch="lenet", width=16, channels=1, classes=10, size=[8, 8])
    for share, most_bits in ((1, 0.15), (0.1, 1.3 * entropy + 0.15)):
        torch.manual_seed(1)
        model = common.build_network(**network)
        for p in model.parameters():
            p.data *= torch.rand_like(p) <= share
        common.save_model(path, "admm_prune", "compact", network, model, digits_args(cstar))
        found, wanted = common.load_model(path).state_dict(), model.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], v) for k, v in wanted.items())
        count, kept = (sum(f(p) for p in model.parameters()) for f in (torch.numel, torch.count_nonzero))
        assert 8 * (os.path.getsize(path) - 4 * int(kept)) / count < most_bits
    model.register_buffer("order", torch.arange(6).view(2, 3))
    args = digits_args(binary_relax, "--eot 3 --restarts 2 --eval-step-size 0.1")
    common.save_model(path, "admm_prune", "compact", network, model, args)
    artifact = common.read_artifact(path)
    assert torch.equal(artifact["state"]["order"], model.order)
    assert artifact["attack_settings"] == dict(dataset="digits", epsilon=0.2, step_size=0.1, eval_steps=20,
                                               restarts=2, eot=3)


# ---------------------------------------------------------------- HYDRA: scores and masks
@pytest.mark.parametrize("ratio", [1, 3, 10, 1e4])
def test_hydra_masks_are_exact_and_the_first_those_of_the_lowest_magnitudes(ratio):
    random = conv_weight(7, 5, 3, 3).float()
    first = hydra_prune.first_score(random, "irregular")
    assert torch.allclose(first, random * math.sqrt(6 / 45) / random.abs().max())
    norms = random.flatten(1).norm(dim=1)
    assert torch.allclose(hydra_prune.first_score(random, "filter"), norms / norms.max())
    assert not any(hydra_prune.first_score(torch.zeros(3, 2), s).any() for s in ("filter", "irregular"))
    for s in (random, first, random.to(memory_format=torch.channels_last), random[:, 0, 0, 0], random.round(),
              torch.ones(7, 5, 3, 3), torch.zeros(9, 3)):
        mask, order = hydra_prune.choose_mask(s, ratio), (-s.abs().flatten()).argsort(stable=True)
        kept = order[:-(-s.numel() // int(ratio))]               # the first among equals
        assert mask.dtype == torch.bool and mask.shape == s.shape
        assert mask.flatten().nonzero()[:, 0].tolist() == kept.sort().values.tolist()
    scores = hydra_prune.Scores(resnet(), "irregular", ratio)
    scores.s[3].data[0, 0] = math.inf
    fails(1, "not finite", scores.masks)


@pytest.mark.parametrize("arch", ["cnn_small", "resnet18", "wrn28_4"])
@pytest.mark.parametrize("scheme", ["irregular", "filter"])
def test_hydra_gradients_of_scores_equal_their_formula(scheme, arch):
    model = shaken(arch, 2, 1, 8).eval()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    scores, cut = hydra_prune.Scores(model, scheme, 3), copy.deepcopy(model)
    count = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert len(scores.s) == count - (scheme == "filter")
    for s in scores.s:                                           # not those that it began with
        s.data *= 1 - 2 * (torch.rand_like(s) < 0.3).double()
        s.data += 0.1 * torch.randn_like(s)
    scores.mask_weights_()
    x, y = torch.rand(5, 1, 8, 8).double(), torch.arange(5)
    F.cross_entropy(model(x), y).backward()
    scores.collect_gradients_()
    for i, s in enumerate(scores.s):
        held = [carrier for carrier in scores.carriers if carrier[0] == i]
        m = hydra_prune.choose_mask(s, 3).double()
        m = (m + held[0][2] * (1 - m)).requires_grad_()          # the network, with m as a leaf
        product = {names[id(p)]: dense[names[id(p)]] * (m if m.shape == p.shape else m.view(
            -1, *[1] * (p.dim() - 1))) for _, p, _ in held}
        assert all(torch.equal(p, product[names[id(p)]]) and p.grad is None for _, p, _ in held)
        out = torch.func.functional_call(model, product, x)
        gradient, = torch.autograd.grad(F.cross_entropy(out, y), m)
        assert torch.allclose(s.grad, s.sign() * gradient) and (s.grad[m < 0.5] != 0).any()
    common.apply_masks_(cut, common.parameter_masks(model, scores.masks(), scheme == "filter"))
    on_sums = [norm for _, norms, _ in common.channel_groups(model) for norm in norms]   # not one filter's
    cut.load_state_dict(cut.state_dict() | {
        name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] in on_sums})
    for training in (False, True):                               # statistics of the batch do not undo the cut
        found, wanted = model.train(training)(x), cut.train(training)(x)
        assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_hydra_radius_grows_by_steps_and_the_pruning_phase_moves_scores_and_batch_norms_alone(
        tmp_path, monkeypatch):
    def attack(model, x, y, *radius_and_step):
        radii.append(radius_and_step[:2])
        zeros.append(int((model.layer1[0].conv1.weight == 0).sum()))
        return x
    radii, zeros, times, run = [], [], [], tmp_path / "run"
    monkeypatch.setattr(hydra_prune, "pgd", attack)
    monkeypatch.setattr(common, "progress", lambda items, *said: times.append(said) or items)
    result = tiny(run, "--ramp-epochs 2 --pretrain-epochs 3 --finetune-epochs 0", script=hydra_prune)
    strengths = [min(1, (step + 1) / 8) for step in range(20)]
    assert np.allclose(radii, [(0.2 * strength, 0.05 * strength) for strength in strengths])
    epsilons = [line["epsilon"] for line in log_of(run) if "phase" in line]  # at each epoch's last step
    assert epsilons == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2])
    assert zeros == [0] * 12 + [3 * 4 * 4 * 9 // 4] * 8          # masked from the first step of pruning on
    epochs = [f"pretrain {i}/3" for i in (1, 2, 3)] + ["prune 1/2", "prune 2/2"]
    assert times == [(epoch, 4, 4 * (4 - i)) for i, epoch in enumerate(epochs)]          # to go: of all steps
    before, after = (common.load_model(run / name) for name in ("dense.pt", "model.pt"))
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        kept = new != 0
        norm = isinstance(before.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
        assert torch.equal(old[kept], new[kept]) != norm, name
    moved = torch.cat([((after.get_submodule(name).weight != 0) ^ hydra_prune.choose_mask(
        layer.weight, 4)).flatten() for name, layer in hydra_prune.prunable(before, "irregular").items()])
    assert result["mask_changed"] == pytest.approx(100 * moved.double().mean().item()) and moved.any()
    assert result["mask_changed"] == log_of(run)[-1]["mask_changed"]


@pytest.mark.parametrize("script, one, other, phases", [
    (hydra_prune, "--scores hydra --prune-epochs 0", "--scores lwm --prune-epochs 0", [2, 2]),
    (hydra_prune, "--scores lwm", "--prune-epochs 0 --finetune-epochs 4", [2, 4]),
    (binary_relax, "--method bc", "--relax-epochs 0 --finetune-epochs 4", [2, 4])])
def test_hydra_without_pruning_epochs_is_lwm_and_bc_is_br_that_switches_at_once(
        whole, tmp_path, script, one, other, phases):
    for name, flags in (("one", one), ("other", other)):
        more = tiny(tmp_path / name, flags, script=script)
    assert same_weights(tmp_path / "one/model.pt", tmp_path / "other/model.pt")
    assert not same_weights(whole(script)[0] / "model.pt", tmp_path / "other/model.pt")
    assert phases_of(tmp_path / "other")[0::2] == phases and not more.get("mask_changed")
    assert not any("lam" in line for line in log_of(tmp_path / "one"))       # BinaryConnect has none


@pytest.mark.parametrize("name", ["natural", "pgd", "trades", "smooth"])
def test_hydra_objectives_are_their_formulas(digits, name):
    """At confident predictions: there the gradients of KL(p || q) and KL(q || p) differ. At half strength."""
    more = dict(trades="--beta 3", smooth="--beta 3 --sigma 0.5").get(name, "")
    args = digits_args(hydra_prune, f"--num-steps 4 --objective {name} {more}")
    model, x, y = resnet(), common.to_float(digits.train[0][:20]), digits.train[1][:20]
    model.linear.weight.data *= 1000
    seen, before = [], copy.deepcopy(model).eval()
    hook = model.register_forward_pre_hook(lambda m, got: seen.append((m.training, got[0].detach())))
    torch.manual_seed(1)
    loss, logits = hydra_prune.objective(model.eval(), x, y, args, 0.5)
    hook.remove()
    first, *near = [image for training, image in seen if training]
    assert torch.allclose(logits, model.train()([first, *near][-1]), atol=1e-5)      # for the log's accuracy
    torch.manual_seed(1)
    if name in ("natural", "pgd"):
        wanted = F.cross_entropy(model.train()(first), y)
        x_adv = common.pgd(before, x, y, 0.1, 0.025, 4)
        assert torch.equal(first, x if name == "natural" else x_adv) and not near
    else:
        log_p, log_q = (F.log_softmax(model.train()(image), 1) for image in (first, *near))
        wanted = F.cross_entropy(model(x), y) + 3 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
        assert torch.equal(first, x)
    assert torch.allclose(loss, wanted, rtol=1e-4)
    if name == "trades":                                         # attacked from beside the clean image
        p = F.softmax(before(x), 1)
        x_adv = common.pgd(before, x, y, 0.1, 0.025, 4, start=x + 0.001 * torch.randn_like(x),
                           loss=lambda logits, _: -(p.detach() * F.log_softmax(logits, 1)).sum(1))
        assert ((near[0] - x_adv).abs() > 1e-6).double().mean() < 0.01
    if name == "smooth":                                         # noise that nothing clamps
        assert near[0].min() < -0.5 and (near[0] - x).std().item() == pytest.approx(0.5, rel=0.1)


# ---------------------------------------------------------------- HYDRA: bounds, and smoothing
def chain(seed, kind="linear"):
    torch.manual_seed(seed)
    if kind == "odd":                                            # sizes that a stride does not divide
        layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(
            4, 4, (2, 3), stride=(2, 1), padding=(0, 1), dilation=(2, 2), bias=False), nn.ReLU(inplace=True),
            nn.Flatten(), nn.LazyLinear(3)]
    elif kind == "linear":
        layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)]
    else:
        layers = common.build_network(kind, 1, 2, 3, (8, 7))
    model, x = nn.Sequential(*layers), torch.rand((4, 6) if kind == "linear" else (4, 2, 8, 7))
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


@pytest.mark.parametrize("kind, seed", [
    *itertools.product(("linear", "odd", "cnn_small"), range(3)), ("cnn_large", 0)])
def test_hydra_bounds_contain_samples_corners_and_attacks(kind, seed):
    """They do not depend on the other images of the batch; one ReLU works in place."""
    model, x, y = chain(seed, kind)
    generator, found = torch.Generator().manual_seed(seed), margins(model, x, y)
    bounds = all_bounds(model, x, y, 0.15)
    alone = [all_bounds(model, x[i:i + 1], y[i:i + 1], 0.15) for i in range(4)]
    for i in range(400):
        noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        points = (x + 0.15 * (noise.sign() if i % 2 else noise)).clamp(0, 1)
        found = torch.minimum(found, margins(model, points, y))
    for loss in ("ce", "margin"):
        attacked = common.pgd(model, x, y, 0.15, 0.03, 30, loss=loss, generator=generator)
        found = torch.minimum(found, margins(model, attacked.double(), y))
    for name, bound in bounds.items():
        assert (bound <= found + 1e-9).all()
        assert torch.allclose(bound, torch.cat([one[name] for one in alone]), atol=1e-12)
    assert (bounds["zero"] >= bounds["ibp"] - 1e-9).all() and (bounds["zero"] > bounds["ibp"] + 1e-4).any()
    assert (bounds["cheap"] == torch.stack([bounds[k] for k in ("ibp", "zero", "crown")]).amax(0)).all()
    for room in ({}, dict(room=1)):                              # room for one unit at a time
        symbolic = all_bounds(model, x, y, 0.15, **room)["symbolic"]
        assert torch.allclose(symbolic, forward_symbols(model, x, y, 0.15), rtol=0, atol=1e-12)
    exact = margins(model, x, y)
    assert all(torch.allclose(bound, exact) for bound in all_bounds(model, x, y, 0.0).values())


@pytest.mark.parametrize("low, high", [
    (-0.3, 0.5), (-0.6, 0.2), (-0.5, 0.45), (0.1, 0.4), (-0.5, -0.1), (0.0, 0.3)])
@pytest.mark.parametrize("c", [-2.0, 3.0])
def test_hydra_bounds_of_one_neuron_are_exact(low, high, c):
    """f_0 - f_1 = c relu(z), z in [low, high]: the line above is reached at both ends, slope 0 at z < 0."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    model.load_state_dict({k: torch.tensor(v).double() for k, v in {
        "0.weight": [[1.0]], "0.bias": [-0.5], "2.weight": [[c], [0.0]], "2.bias": [0.7, 0.0]}.items()})
    x = torch.tensor([[0.5 + (low + high) / 2]]).double()
    bounds = all_bounds(model, x, torch.tensor([0]), (high - low) / 2)
    half = low if low < 0 < high and high > -low else max(low, 0)            # slope 1 where high is larger
    exact = 0.7 + min(c * max(low, 0), c * max(high, 0))
    wanted = dict(zero=exact, ibp=exact, crown=exact if c < 0 else 0.7 + c * half)
    assert {k: bounds[k][0, 1].item() for k in wanted} == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_hydra_bounds_never_exceed_the_exact_margin_of_a_mixed_integer_program(seed):
    """Each ReLU h = relu(z), z in [l, u], has a switch s: z <= h <= z - l (1 - s) and 0 <= h <= u s."""
    optimize, (model, x, y) = pytest.importorskip("scipy.optimize"), chain(seed)
    x, y, true = x[:1], y[:1], int(y[0])
    boxes = hydra_prune.interval_boxes(hydra_prune.plain_layers(model), x, 0.2)
    (low, up), (l1, u1), (l2, u2) = ([end[0].detach().numpy() for end in boxes[i]] for i in (0, 1, 3))
    (l1, l2), (u1, u2) = np.minimum([l1, l2], 0), np.maximum([u1, u2], 0)
    w1, w2, w3 = (model[i].weight.detach().numpy() for i in (0, 2, 4))
    b1, b2, b3 = (model[i].bias.detach().numpy() for i in (0, 2, 4))
    eye, none, wide, inf = np.eye(12), np.zeros((12, 12)), np.zeros((12, 6)), np.full(12, np.inf)
    rows = np.block([[-w1, eye, none, none, none], [-w1, eye, -np.diag(l1), none, none],     # x, h, s, h, s
                     [wide, eye, -np.diag(u1), none, none], [wide, -w2, none, eye, none],
                     [wide, -w2, none, eye, -np.diag(l2)], [wide, none, none, eye, -np.diag(u2)]])
    program = dict(
        constraints=optimize.LinearConstraint(rows, np.concatenate([b1, -inf, -inf, b2, -inf, -inf]),
                                              np.concatenate([inf, b1 - l1, 0 * u1, inf, b2 - l2, 0 * u2])),
        bounds=optimize.Bounds(np.r_[low, np.zeros(48)], np.r_[up, u1, np.ones(12), u2, np.ones(12)]),
        integrality=np.r_[np.zeros(6), np.tile(np.repeat([0, 1], 12), 2)])
    points = (x + 0.2 * (2 * torch.rand(5000, 6).double() - 1)).clamp(0, 1)
    sampled, ours = margins(model, points, y.expand(5000)).amin(0), all_bounds(model, x, y, 0.2)
    for j in {0, 1, 2} - {true}:
        cost = np.r_[np.zeros(30), w3[true] - w3[j], np.zeros(12)]
        exact = optimize.milp(cost, **program).fun + b3[true] - b3[j]
        assert all(bound[0, j] <= exact + 1e-5 for bound in ours.values()) and exact <= sampled[j] + 1e-5


def test_hydra_symbolic_bound_verifies_what_pgd_trained_and_gets_what_is_open(digits, monkeypatch):
    model = trained("--arch cnn_small --width 16 --pretrain-epochs 10 --epsilon 0.04 --num-steps 5")
    with common.evaluating(model) as generator:
        robust = common.first_broken_iterate(
            model, digits.test, generator, epsilon=0.04, step_size=0.01, num_steps=10) > 10
    def verified_by(bound):
        monkeypatch.setattr(hydra_prune, "symbolic_margins", bound)
        return hydra_prune.verify(model, digits.test, 0.04, robust)["verified_acc"]
    symbolic = Mock(wraps=hydra_prune.symbolic_margins)
    with_it, without = verified_by(symbolic), verified_by(lambda layers, boxes, y: torch.zeros(len(y), 10))
    seen = [call.args[1][0][0] for call in symbolic.call_args_list]
    assert with_it > 70 and without < 30
    monkeypatch.undo()
    x, y = common.to_float(digits.test[0]).double(), digits.test[1]
    bounds = all_bounds(copy.deepcopy(model).double(), x, y, 0.04)
    cheap, four = ((lower.scatter(1, y[:, None], 1.0) > 0).all(1) for lower in (
        bounds["cheap"], torch.maximum(bounds["cheap"], bounds["symbolic"])))
    assert torch.equal(torch.cat(seen), (x - 0.04).clamp(min=0)[robust & ~cheap]) and max(map(len, seen)) <= 8
    assert [with_it, without] == [common.per_cent(four), common.per_cent(cheap)]
    assert not (four & ~robust).any() and (~robust & ~cheap).any() and cheap.any()


@pytest.mark.parametrize("name, words", [("cheap_margins", "not sound"), ("symbolic_margins", "out of room")])
def test_hydra_bound_that_is_wrong_unknown_or_breaks_is_noticed_and_changes_nothing(
        digits, monkeypatch, name, words):
    def verify(model, robust):
        return hydra_prune.verify(model, images, 0.01, robust)
    def broken(layers, boxes, y):
        if name == "symbolic_margins":
            raise MemoryError(words)
        return torch.ones(len(y), 10)
    torch.manual_seed(0)
    model, images = common.build_network("cnn_small", 4, 1, 10, (8, 8)), [t[:120] for t in digits.test]
    found = common.evaluate(model, images, **SETTINGS | {"epsilon": 0.01}, extra_metrics=verify)
    assert 0 < found["verified_acc"] <= found["robust_acc"] < 100
    for margin in (0.0, 3e-8):                       # none, or less than float32 can tell, proves nothing
        flat = linear(torch.zeros(1, 64), 1.0).append(linear(torch.ones(10, 1), margin, *[0.0] * 9)[1])
        assert verify(flat, torch.ones(120) == 1)["verified_acc"] == 0
    monkeypatch.setattr(hydra_prune, name, broken)
    model[2].train(), model[3].eval()
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises((common.Fault, MemoryError), match=words):
        verify(model, torch.arange(120) % 3 > 0)
    assert modes == [m.training for m in model.modules()]
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for odd in (nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(3, 3, 3, padding="same"),
                nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), type("Own", (nn.ReLU,), {})()):
        model = nn.Sequential(odd, nn.Flatten(), nn.Linear(12, 2))
        fails(1, "no bounds are known", hydra_prune.plain_layers, model)
    own = type("Own", (nn.Sequential,), {})(nn.Linear(3, 2))     # its forward may differ
    fails(1, "no bounds are known for Own", hydra_prune.plain_layers, own)
    fails(1, "does not end", hydra_prune.plain_layers, nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert hydra_prune.verify(resnet(), None, 0.1, None) == {}


def test_hydra_symbolic_bounds_of_many_parts_keep_little_for_the_backward_pass():
    layers = hydra_prune.plain_layers(shaken("cnn_small", 8, 1, 8))
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    kept, found = [], []
    for room in (1, None):
        numbers, boxes = [], hydra_prune.interval_boxes(layers, x.double(), 0.1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            bound = hydra_prune.symbolic_margins(layers, boxes, y, room).sum()
        found.append(torch.autograd.grad(bound, layers[0].weight)[0])
        kept.append(sum(numbers))
    assert torch.allclose(*found) and found[0].any() and kept[0] < kept[1] / 2


def test_hydra_losses_of_bounds_are_their_formulas_and_reach_the_weights(digits):
    model, x, y = chain(1)
    args, coins = digits_args(hydra_prune, "--objective mixtrain --mix-images 7"), []
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
    for found, sought in zip(*(torch.autograd.grad(of, [*model.parameters()]) for of in (loss, wanted))):
        assert torch.allclose(found, sought) and found.any()
    args = digits_args(hydra_prune, "--objective crown-ibp --final-share 0.25")
    for strength, share in ((0.0, 1.0), (0.5, 0.625), (1.0, 0.25)):
        loss, logits = hydra_prune.objective(model, x, y, args, strength)
        bounds = all_bounds(model, x, y, 0.02 * strength)
        mixed = share * bounds["crown"] + (1 - share) * bounds["ibp"]
        assert torch.allclose(logits, -mixed) and torch.allclose(loss, F.cross_entropy(-mixed, y))
        assert all(g.any() for g in torch.autograd.grad(loss, [*model.parameters()]))
        fields = hydra_prune.train_epoch(model, [(x, y)], *sgd(model.parameters(), 0.0), args,
                                         strength_at=lambda _: strength)
        assert (fields["share"], fields["epsilon"]) == (share, 0.02 * strength)
        assert "train_verified_acc" in fields
    model[-1].bias = None                                        # a fork's
    assert all(torch.allclose(bound, margins(model, x, y)) for bound in all_bounds(model, x, y, 0.0).values())


def test_hydra_weight_of_mixtrain_grows_at_the_full_radius_and_scores_have_no_decay(tmp_path, monkeypatch):
    monkeypatch.setattr(hydra_prune, "train_epoch", train_epoch := Mock(wraps=hydra_prune.train_epoch))
    tiny(tmp_path / "run", "--ramp-epochs 1", script=hydra_prune)
    epochs, weights = train_epoch.call_args_list, []
    assert [call.kwargs["t"] for call in epochs] == [-1, 0, 0, 1, 0, 1]
    groups = [[(len(g["params"]), g["weight_decay"]) for g in call.args[2].param_groups] for call in epochs]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in resnet().modules())
    scores = len(hydra_prune.Scores(resnet(), "irregular", 2).s)
    assert groups[2] == [(2 * norms, 5e-4), (scores, 0)] and groups[0][0][1] == groups[4][0][1] == 5e-4
    monkeypatch.setattr(hydra_prune, "objective", lambda model, x, y, args, strength, mix: (
        weights.append(mix), (model(x).sum(), model(x)))[1])
    model, x, y = chain(0)
    for epoch in (-30, 0, 4, 5, 10, 34, 35, 9999):
        fields = train_epoch(model, [(x, y)], *sgd(model.parameters(), 0.0),
                             digits_args(hydra_prune, "--objective mixtrain"), t=epoch)
        assert fields["mix"] == weights[-1]
    assert weights == pytest.approx([0.1, 0.1, 0.1, 0.25, 0.625, 0.1 * 2.5**6, 50, 50])


def test_smoothing_radius_is_below_the_true_distance():
    def certify(draws):
        generator = torch.Generator().manual_seed(0)
        return judges.certify(model, image, generator, sigma=0.25, draws=draws, classes=2)
    drawn, model = [], linear(F.pad(STEP, (0, 3)), -0.1, 0.0)    # class 1 where x_0 > -0.1, beyond the pixels
    model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0]))
    image = torch.tensor([0.2, 0.1, 0.2, 0.9]).view(1, 2, 2)     # at distance 0.3
    label, r = certify(20000)
    assert label == 1 and 0.27 < r < 0.3
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 100 + 20000     # the bound has draws of its own
    for x, wanted in ((-0.1, (None, 0.0)), (9.0, (1, 0.25 * NormalDist().inv_cdf(0.001 ** (1 / 2000))))):
        image[0, 0, 0] = x                                       # on the plane: it must abstain; far from it
        assert certify(2000) == (wanted[0], pytest.approx(wanted[1]))


def test_smoothing_curve_falls_and_counts_a_wrong_class_and_what_abstains_as_wrong():
    """Class 1 where the pixel is above one half: images at distances 0, 0.2, 0.5, and 0.5 of class 0."""
    model, y = linear(STEP, 0.5, 0.0), torch.tensor([1, 1, 1, 0, 1])
    x = torch.tensor([128, 179, 255, 255, 0], dtype=torch.uint8)
    found = judges.smoothing_curve(model, (x.view(5, 1, 1, 1), y), sigma=0.25, count=4, draws=1000, classes=2)
    assert (found["abstained"], found["images"]) == (1, 4)       # the last one was not asked for
    two = x[1:4].view(3, 1, 1, 1), torch.tensor([1, 1, 0])       # of a balanced subset one of each class
    two = judges.smoothing_curve(model, two, sigma=0.25, count=2, draws=1000, classes=2)
    assert two["curve"]["0.00"] == 50.0
    curve = list(found["curve"].values())                        # at 0, 0.05, ..., about 0.45
    assert curve[:5] == [50.0] * 4 + [25.0] and {*curve[5:]} == {25.0} and 9 <= len(curve) <= 11


# ---------------------------------------------------------------- Binary-Relax
BITS = (1, 2, 4)
GOLDEN = [0.9, -0.5, 0.1, -0.05, 0.3, 1.4, -0.2, 0.02]


def quantised(v, bits):
    codes, scale = binary_relax.project(v, bits)
    return scale * codes


@pytest.mark.parametrize("bits, v, codes, scale", [
    (1, GOLDEN, [1, -1, 1, -1, 1, 1, -1, 1], 0.43375), (2, GOLDEN, [1, -1, 0, 0, 0, 1, 0, 0], 0.9333333),
    (4, GOLDEN, [5, -3, 1, 0, 2, 7, -1, 0], 0.1876404), (1, [0.0, -0.0, -1.0], [1, 1, -1], 1 / 3),
    (2, [7.0, 3.0], [1, 0], 7.0), (2, [7.0, 3.77], [1, 1], 5.385),
    (4, [0.5, 0.51, 1.5, -1.51, 6.5, 7.5], [0, 1, 1, -2, 6, 7], 96.53 / 91),             # ties: s0 = 1
    *((bits, [-3.0], [-1 if bits < 4 else -7], 3.0 if bits < 4 else 3 / 7) for bits in BITS),
    *((bits, [0.2] * 4, [1 if bits < 4 else 7] * 4, 0.2 if bits < 4 else 0.2 / 7) for bits in BITS),
    *((bits, [0.0] * 3, [1 if bits == 1 else 0] * 3, 0.0) for bits in BITS)])
def test_relax_projection_of_the_golden_vector(bits, v, codes, scale):
    found, s = binary_relax.project(torch.tensor(v, dtype=torch.float64), bits)
    assert found.tolist() == codes and s.item() == pytest.approx(scale, abs=1e-7)


@pytest.mark.parametrize("bits, seed", [*itertools.product(BITS, range(5))])
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
        assert torch.equal(binary_relax.project(w, bits)[0], binary_relax.project(v, bits)[0])
        assert torch.allclose(quantised(w, bits), q)
    for lam, wanted in ((0, v), (math.inf, q)):
        assert torch.equal(binary_relax.relax(v, bits, lam), wanted)


@pytest.mark.parametrize("bits, theta", [*itertools.product(BITS, [0.25, 0.5, 0.9375])])
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


@pytest.mark.parametrize("adv, nat", [(2, 0), (0, 2), ("8/9", "1/9")])
def test_relax_step_moves_latent_weights_by_the_gradient_at_relaxed_ones(digits, monkeypatch, adv, nat):
    """One step of SGD with weight decay, by hand; both images are weighed, attacks made where asked for. An
    exception leaves the weights as they were, bit for bit."""
    flags = f"--bits 2 --adv-weight {adv} --nat-weight {nat}" + " --num-steps 3" * bool(adv)
    args = digits_args(binary_relax, flags)
    torch.manual_seed(0)
    model, calls = binary_relax.EnResNet(8, 1, 0.0, 2, 1, 10), []
    targets, lam = binary_relax.quantisable(model), 1.5
    twin, (x, _) = copy.deepcopy(model), next(digits.batches(16, torch.Generator().manual_seed(1)))
    v = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(Stop), binary_relax.relaxed([*targets.values()], args.bits, lam):
        assert not any(torch.equal(w, v[name]) for name, w in targets.items())
        raise Stop
    assert all(torch.equal(p, v[name]) for name, p in model.named_parameters())
    for name, p in twin.named_parameters():
        if name in targets:
            p.data = (lam * quantised(p.data, 2) + p.data) / (lam + 1)
    y = copy.deepcopy(twin)(x).argmax(1)                         # all clean images are right
    torch.manual_seed(3)
    x_adv = common.pgd(twin.eval(), x, y, args.epsilon, 0.05, 3)
    loss, wanted = 0, {}
    for name, weight, image in (("robust", args.adv_weight, x_adv), ("clean", args.nat_weight, x)):
        logits = twin.train()(image)
        loss = loss + weight * F.cross_entropy(logits, y)
        if weight:
            wanted[f"train_{name}_acc"] = 100 * (logits.argmax(1) == y).double().mean().item()
    loss.backward()
    assert len({*wanted.values()}) == len(wanted)                # attacked images are told from clean ones
    optimizer = sgd(model.parameters(), 0.1, weight_decay=0.01)
    monkeypatch.setattr(binary_relax, "pgd", lambda *a: calls.append(a) or common.pgd(*a))
    torch.manual_seed(3)
    logged = binary_relax.train_epoch(model, [(x, y)], *optimizer, args, list(targets.values()), lam)
    assert logged == pytest.approx(wanted | dict(loss=loss.item()), rel=1e-4) and len(calls) == (adv != 0)
    for (name, p), other in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(p, v[name] - 0.1 * (other.grad + 0.01 * v[name]), atol=1e-6), name


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


def test_enresnet_noise_is_relative_seeded_and_of_each_image_alone(monkeypatch):
    def noisy(h):
        torch.manual_seed(1)
        return binary_relax.add_noise(h, 0.3)
    leaf = torch.randn(2, 8, 32, 32).double() * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1) + 3
    leaf.requires_grad_()
    torch.manual_seed(1)
    noise = torch.randn(2, 32, 32, 8).permute(0, 3, 1, 2).double()
    plain, found = leaf + 0.3 * leaf.flatten(1).std(1).view(2, 1, 1, 1) * noise, noisy(leaf)
    gradients = [torch.autograd.grad(out.square().sum(), leaf)[0] for out in (found, plain)]
    assert torch.allclose(found, plain) and torch.allclose(*gradients)
    leaf = torch.zeros(2, 1, 4, 4, requires_grad=True)           # no spread: no noise, and a finite gradient
    noisy(leaf).sum().backward()
    assert leaf.grad.isfinite().all()
    model, _, x = ensemble(noise=0.1)
    for training in (False, True):                               # on in training and in evaluation
        model.train(training)
        assert not torch.allclose(model(x), model(x))
    levels, blocks = [], sum(len(member.blocks) for member in model.members)
    monkeypatch.setattr(binary_relax, "add_noise", lambda h, noise: levels.append(noise) or h)
    model(x)
    assert levels == [0.1] * blocks


@pytest.mark.parametrize("arch, channels, size, bits", [
    *itertools.product(["enresnet"], [3], [12], (*BITS, 32)), ("resnet18", 3, 16, 2), ("vgg16", 3, 32, 2),
    ("wrn28_4", 2, 8, 2), ("lenet", 1, 12, 2), ("cnn_small", 1, 8, 2)])
def test_network_without_dead_channels_equals_the_quantised_one(arch, channels, size, bits):
    model, network, _ = ensemble(noise=0.1)
    if arch != "enresnet":
        model = shaken(arch, 2, channels, size).eval()
        network = dict(arch=arch, width=2, channels=channels, classes=10, size=[size, size])
    targets = binary_relax.quantisable(model)
    for name, w in targets.items():
        if "conv2" in name or arch not in ("enresnet", "resnet18", "wrn28_4"):
            w.data[:, ::3] *= 1e-6
    state, codes, found = binary_relax.encode(model, bits, network)
    sizes = [math.ceil(math.prod(shape) * bits / 8) for shape in codes["shapes_of_codes"].values()]
    assert codes["codes"].dtype == torch.uint8 and len(codes["codes"]) == sum(sizes)     # last byte padded
    small = binary_relax.build(dict(network=network, state=copy.deepcopy(state), **codes)).double().eval()
    for name, w in targets.items() if bits < 32 else ():
        w.data = quantised(w.data, bits)
    x, outs = torch.rand(3, channels, size, size, dtype=torch.float64), []
    for m in (model, small):
        torch.manual_seed(2)
        outs.append(m(x))
    assert torch.allclose(*outs, rtol=0, atol=1e-5 * outs[0].abs().max().item())
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert (counts[0] < counts[1]) == (found["channel_sparsity"] > 0) == (bits in (2, 4))


class Fork(nn.Module):
    """Two convolutions, 4 channels between them, and whatever `join` does with what the first gives."""
    def __init__(self, join, *layers, channels=1, wide=4):
        super().__init__()
        self.conv1, self.layers = nn.Conv2d(channels, 4, 3, padding=1), nn.ModuleList(layers)
        self.conv2, self.linear, self.join = nn.Conv2d(wide, 4, 1), nn.Linear(4, 10), join
        self.param = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.linear(F.relu(self.conv2(self.join(self, self.conv1(x), x))).mean((2, 3)))


@pytest.mark.parametrize("why, fork", [
    (None, Fork(lambda net, h, x: F.relu(h))), (None, Fork(lambda net, h, x: net.layers[0](h), nn.PReLU())),
    (None, Fork(lambda net, h, x: h + net.layers[0](x), nn.Conv2d(1, 4, 1))),
    ("other logits", Fork(lambda net, h, x: h + x)), ("other logits", Fork(lambda net, h, x: h.flip(1))),
    ("other logits", Fork(lambda net, h, x: net.layers[0](h.flip(1)), nn.Sequential(
        *[layer for c, d in itertools.pairwise([4, *[24] * 15, 4])
          for layer in (nn.Conv2d(c, d, 3, padding=1), nn.ReLU())]))),
    ("other logits", Fork(lambda net, h, x: F.sigmoid(h))),
    ("other logits", Fork(lambda net, h, x: h + net.layers[0][0], nn.ParameterList([torch.zeros(1)]))),
    ("other logits", Fork(lambda net, h, x: torch.cat([h, net.layers[0](h)], 1), nn.Conv2d(4, 4, 1), wide=8)),
    ("shape", Fork(lambda net, h, x: torch.hstack([h, x]), wide=5)),
    ("shape", Fork(lambda net, h, x: h[:, :2] + h[:, 2:], wide=2)),
    ("size", Fork(lambda net, h, x: h + x, channels=4)), ("size", Fork(lambda net, h, x: h + net.param)),
    ("layers.0 has groups", Fork(lambda net, h, x: net.layers[0](h), nn.Conv2d(4, 4, 1, groups=4))),
    ("shape", Fork(lambda net, h, x: net.layers[0](net.layers[0](h)), nn.Conv2d(4, 4, 1))),
    ("size", Fork(lambda net, h, x: net.layers[0](h), nn.GroupNorm(1, 4))),
    ("size", Fork(lambda net, h, x: net.layers[0](h), nn.BatchNorm2d(4, affine=False))),
    ("torch.fx finds no graph", Fork(lambda net, h, x: h if h.sum() > 0 else -h)),
    ("torch.fx finds no graph", Fork(lambda net, h, x: h.unflatten(1, (len(h), 4))))])
def test_filters_are_removed_where_zeros_in_their_place_give_the_same_logits(why, fork):
    network, before = dict(channels=fork.conv1.in_channels, size=[8, 8]), copy.deepcopy(fork.state_dict())
    random, state = torch.get_rng_state(), {"conv2.weight": torch.zeros(4, fork.conv2.in_channels, 1, 1)}
    state |= {"conv1.weight": before["conv1.weight"], "linear.weight": torch.ones(10, 4)}
    small = binary_relax.without_dead(fork, state, network)
    if why:
        assert small == state
        fails(1, f"filter.* removed .*{why}", common.removable_groups, fork, network)
    else:
        assert common.removable_groups(fork, network)[-1] == ({"conv2": None}, [], ["linear"])
        assert len(small["conv1.weight"]) == 1
    assert torch.equal(random, torch.get_rng_state()) and fork.training
    assert all(torch.equal(t, before[name]) for name, t in fork.state_dict().items())


@pytest.mark.parametrize("script", [admm_prune, hydra_prune])
def test_filters_that_cannot_be_removed_end_a_run_before_it_begins(script, tmp_path, monkeypatch):
    monkeypatch.setitem(common.NETWORKS, "fork", lambda *_: Fork(lambda net, h, x: h + x))
    monkeypatch.setattr(script, "train_epoch", Mock(side_effect=Stop))
    flags = "--arch fork --scheme filter".split()
    fails(1, "filters cannot be removed", tiny, tmp_path / "run", *flags, script=script)
    assert not (tmp_path / "run").exists()


def test_a_channel_that_only_removed_filters_read_goes_too_and_one_always_stays():
    def encoded(model, network):
        state, codes, _ = binary_relax.encode(model, 2, network)
        return binary_relax.build(dict(network=network, state=state, **codes)).eval()
    fails(1, "share a weight", binary_relax.encode, nn.Sequential(*[nn.Conv2d(4, 4, 1)] * 2), 2, {})
    network = dict(arch="vgg16", width=1, channels=3, classes=10, size=[32, 32])
    model = common.build_network(**network)
    for w in binary_relax.quantisable(model).values():
        w.data.fill_(1)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    convs[2].weight.data[:, 0] = 0                               # nothing reads filter 0 of the one before,
    convs[1].weight.data[1:, 1] = 0                              # which alone reads filter 1 of the first
    small = encoded(model, network)
    assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)][:3] == [3, 3, 8]
    convs[3].weight.data[0, 0, 0, 0] = math.nan
    fails(1, "not finite", binary_relax.encode, model, 2, network)
    model, network, x = ensemble(noise=0.0)
    model.members[0].blocks[1].conv2.weight.data.zero_()
    small = encoded(model, network)
    assert small.members[0].blocks[1].conv1.out_channels == 1 and small(x.float()).isfinite().all()
    a, b = torch.ones(2, 4, 3, 3), torch.ones(4, 2, 1, 1)
    a[:, 1] = 0
    a[0, 2] = 0
    b[3] = 0                                                     # a filter, no input channel
    assert binary_relax.sparsity([a]) == dict(sparsity=37.5, channel_sparsity=25.0)
    assert binary_relax.sparsity([a, b]) == dict(sparsity=36.25, channel_sparsity=16.667)     # 29 / 80, 1 / 6
    assert binary_relax.sparsity([a, a])["channel_sparsity"] == 25


@pytest.mark.parametrize("bits, more", [*((bits, "") for bits in (*BITS, 32)), (2, "--noise 0.1 --eot 2")])
def test_relax_run_writes_a_smaller_file_of_few_values(whole, bits, more):
    folder, result = whole(binary_relax, f"--bits {bits} {more}")
    model, most = common.load_model(folder / "model.pt"), {1: 2, 2: 3, 4: 15, 32: math.inf}[bits]
    weights = [w.detach() for w in binary_relax.quantisable(model).values()]
    for w in weights:
        levels = w.unique()
        steps = levels / w.abs().max() * (2**(bits - 1) - 1 if bits > 1 else 1)
        assert len(levels) <= most and (bits == 32 or torch.allclose(steps, steps.round(), atol=1e-3))
    assert max(len(w.unique()) for w in weights) > 2**(min(bits, 8) - 1)
    zeros = 100 * (torch.cat([w.flatten() for w in weights]) == 0).double().mean().item()
    assert (result["sparsity"] > 5) == (bits in (2, 4))
    assert result["channel_sparsity"] > 0 or result["sparsity"] == pytest.approx(zeros, abs=0.01)
    assert max(result["fgsm_acc"], result["robust_acc"]) <= result["clean_acc"] + 3 * bool(more)  # draws
    assert any(flag.startswith("random output") for flag in result["flags"]) == bool(more)
    assert result["args"]["relax_lr"] == result["args"]["lr"] / 2
    assert result["bytes"] == os.path.getsize(folder / "model.pt")
    assert (result["bytes"] < result["dense_bytes"]) == (bits < 32)
    rows = [line for line in log_of(folder) if line.get("phase") in ("relax", "finetune")]
    assert phases_of(folder, binary_relax) == [2, 2, 2]
    assert [row.get("lam") for row in rows[:2]] == ([1, 350**0.5] if bits < 32 else [None, None])
    if bits < 32:                                                # the log has the zeros of q
        assert all((row["sparsity"] > 5) == (bits > 1) for row in rows)
        assert all(rows[-1][key] == result[key] for key in ("sparsity", "channel_sparsity"))


@pytest.mark.parametrize("bits, zeros, error", [(2, 42, 1.01), (4, 22, 2)])        # README and docstring
def test_relax_rounding_of_gaussian_weights_makes_zeros_and_is_not_the_nearest(bits, zeros, error):
    def least(v, most=2**(bits - 1) - 1):                        # by trying scales
        codes = [(v.abs() / s).round().clamp(max=most) for s in torch.linspace(0.1, 2, 80).double()]
        return min((v.abs() - (v.abs() * c).sum() / c.square().sum() * c).square().sum() for c in codes)
    found, ratios, theirs = [], [], []                           # theirs: with their scale, a mean over all
    for v in (conv_weight(36864, seed=seed).double() for seed in range(20)):
        codes, scale = binary_relax.project(v, bits)
        found.append(codes == 0)
        if len(found) <= 4:
            ratios.append((v - scale * codes).square().sum() / least(v))
            theirs.append((v - (v * codes).mean() * codes).square().sum() / least(v))
    assert 100 * torch.stack(found).double().mean().item() == pytest.approx(zeros, abs=1)
    assert torch.stack(ratios).mean().item() == pytest.approx(error, abs=0.01 if bits == 2 else 0.3)
    assert bits == 4 or torch.stack(theirs).mean().item() == pytest.approx(1.8, abs=0.05)
    by_size = [sum((binary_relax.project(conv_weight(n, seed=seed), bits)[0] == 0).double().mean().item()
                   for seed in range(40)) / 0.4 for n in (432, 147456)]
    assert by_size == pytest.approx([42, 42] if bits == 2 else [17, 24], abs=1)      # by the largest weight


def test_relax_pretrains_float_weights_and_reports_the_attacks_it_names(tmp_path, monkeypatch):
    flags = ("--pretrain-epochs 1 --relax-epochs 0 --finetune-epochs 0 --num-steps 0 --seed 3 "
             "--noise 0.1 --eot 2 --bits")
    same = dict(epsilon=0.2, random_start=False, anneal=False, restarts=1, seed=3)
    monkeypatch.setattr(common, "evaluate", lambda model, *_, extra_metrics, **more: dict(
        clean_acc=1.0, robust_acc=2.0) | extra_metrics(model, None))
    monkeypatch.setattr(binary_relax, "evaluate", lambda *_, **attack: dict(
        clean_acc=1.0, robust_acc=4.0 + attack["num_steps"], robust_ci=[2, 3], attack=attack))
    monkeypatch.setattr(common, "sanity_flags", lambda *_, **more: [])
    for bits in "14":
        found = tiny(tmp_path / bits, flags, bits, script=binary_relax, evaluate=True)
        assert [found[f"{name}_acc"] for name in ("fgsm", "ifgsm", "margin")] == [5, 24, 24]
        assert found["fgsm_ci"] == [2, 3] and found["attacks"] == dict(
            fgsm=same | dict(step_size=0.2, num_steps=1, eot=1),
            ifgsm=same | dict(step_size=0.025, num_steps=20, eot=1),
            margin=same | dict(step_size=0.025, num_steps=20, eot=2, losses=["margin"]))
    assert same_weights(tmp_path / "1/dense.pt", tmp_path / "4/dense.pt")
    fails(2, "too deep", binary_relax.make_network, "enresnet", (3, 8))


@pytest.mark.parametrize("more", ["--relax-epochs 0", "--relax-epochs 1", "--relax-epochs 1 --method bc"])
def test_relax_without_fine_tuning_has_statistics_of_the_quantised_network(tmp_path, more):
    tiny(tmp_path / "run", "--pretrain-epochs 1 --finetune-epochs 0", more, script=binary_relax)
    model = common.load_model(tmp_path / "run/model.pt")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    spreads, data = [m.running_var.mean() for m in norms], common.load_data(cstar.get_args(TINY.split()))
    common.reestimate_batchnorm_(model, [(common.to_float(data.train[0]), None)], 1)
    for m, found in zip(norms, spreads):
        assert found == pytest.approx(m.running_var.mean().item(), rel=0.2)


def test_relax_quantises_the_networks_of_common_from_a_dense_one(whole, finished, tmp_path, monkeypatch):
    def run(folder, pretrained, more):
        flags = ("--dataset digits --device cpu --width 1 --train-images 128 --batch-size 32 --num-steps 1 "
                 "--relax-epochs 1 --finetune-epochs 1 --output")
        binary_relax.main(argv_of(flags, tmp_path / folder, more, "--pretrained", pretrained))
        assert same_weights(pretrained, tmp_path / folder / "dense.pt")
    unevaluated(monkeypatch)
    dense, own = finished[0] / "dense.pt", whole(binary_relax)[0] / "dense.pt"
    run("run", dense, "--arch resnet18")
    run("again", own, "--noise 0 --depth 8")
    kept = common.load_model(tmp_path / "run/model.pt").state_dict()
    assert len(kept["layer1.0.conv1.weight"].unique()) <= 3 < len(kept["layer2.0.shortcut.0.weight"].unique())
    for file, depth in ((own, 14), (dense, 8), (own.with_name("model.pt"), 8)):
        fails(2, "--pretrained", run, "refused", file, f"--noise 0 --depth {depth}")


# ---------------------------------------------------------------- runs end to end
@pytest.mark.parametrize("script, flags, name", [
    (cstar, "", "cstar-digits-resnet18-w4-s0-r16-hull-parameters"),
    (cstar, "--dataset /my/pets --epsilon 0.1", "cstar-pets-resnet18-w16-s0-r16-hull-parameters"),
    (admm_prune, "--scheme column --ratio 2.5", "admm_prune-digits-resnet18-w4-s0-admm-column-r2.5"),
    (hydra_prune, "--scores lwm --seed 7", "hydra_prune-digits-resnet18-w4-s7-lwm-pgd-irregular-r10"),
    (binary_relax, "--bits 1 --method bc", "binary_relax-digits-enresnet-w8-s0-b1-bc")])
def test_the_default_folder_tells_the_method(tmp_path, monkeypatch, script, flags, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Run, "active", None)
    args = script.get_args(["--dataset", "digits", *flags.split()])
    data = Mock(train=(None, torch.zeros(2)))
    assert common.Run(args, data, script.__file__, {}, []).folder == Path("runs", name) == Path(args.output)


def test_cstar_run_writes_a_smaller_file_that_is_what_it_reports(finished):
    folder, result = finished
    sizes = [os.path.getsize(folder / name) for name in ("model.pt", "dense.pt")]
    assert result["bytes"] == sizes[0] < result["dense_bytes"] == sizes[1]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert phases_of(folder) == [2, 2, 2] and log_of(folder)[-1]["phase"] == "final"
    logged = [line["seconds"] for line in log_of(folder) if line.get("phase") == "pretrain"]
    spent = common.read_file(folder / "last.pt")["seconds"]["pretrain"]
    assert sum(logged) - 0.02 < spent < sum(logged) + 2          # of all epochs, each counted once
    assert result["seconds"]["pretrain"] == round(spent, 1)
    assert shlex.split(result["command"])[:4] == ["python", "cstar.py", *TINY.split()[:2]]
    x, model = torch.rand(2, 1, 8, 8), common.load_model(folder / "model.pt")
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)


def test_a_result_reports_what_is_of_the_compact_network_which_keeps_a_budget_of_macs(tmp_path, monkeypatch):
    def count(model):
        return sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(common, "evaluate", lambda model, *_, **more: dict(
        clean_acc=float(count(model)), robust_acc=count(model) / 2))
    monkeypatch.setattr(common, "sanity_flags", lambda model, *_, **more: [str(count(model))])
    monkeypatch.setattr(common, "latency", lambda *_: [2.0, 1.0])
    monkeypatch.setitem(common.NETWORKS, "fork", lambda *_: Fork(
        lambda net, h, x: net.layers[0](h), nn.ConvTranspose2d(4, 4, 2, 2)))         # it stays, and counts
    fails(2, r"1.4 is not from 1 to 1\.2", tiny, tmp_path / "fork", "--arch fork --budget macs --ratio 1.4")
    found = tiny(tmp_path, UNTRAINED, "--budget macs --ratio 2 --width 4", evaluate=True)
    (artifact, compact), (_, dense) = (
        common.read_model(tmp_path / name) for name in ("model.pt", "dense.pt"))
    assert found["flags"] == [str(count(compact))] and found["parameters"] == count(compact) < count(dense)
    said = log_of(tmp_path)[-1]
    for model, result in ((compact, found), (compact, said), (dense, found["dense"])):
        assert [result["clean_acc"], 2 * result["robust_acc"]] == [count(model)] * 2
    assert [said["dense_clean_acc"], 2 * said["dense_robust_acc"]] == [count(dense)] * 2
    assert found["bytes_ratio"] == round(found["dense_bytes"] / found["bytes"], 3)
    assert found["versions"] == dict(python=platform.python_version(), torch=torch.__version__,
                                     numpy=np.__version__)
    assert (found["threads"], found["processes"], said["flags"]) == (1, 1, str(count(compact)))
    assert [found["dense_macs"], found["macs"]] == [
        common.count_macs(model, artifact["network"]) for model in (dense, compact)]
    assert found["macs_ratio"] == round(found["dense_macs"] / found["macs"], 3)
    assert 2 * found["macs"] <= found["dense_macs"] < 2.08 * found["macs"]
    assert found["nonzeros"] == sum(int(p.count_nonzero()) for p in compact.parameters())
    assert found["train_images"] == 128 and 2**27 < (found["memory_bytes"] or 2**28) < 2**40
    if sys.platform == "linux":                                  # whose getrusage() passes on a parent's
        monkeypatch.setattr("resource.getrusage", lambda _: Mock(ru_maxrss=2**40))
        assert common.peak_memory() < 2**40


def test_a_runs_seed_is_that_of_its_weights_its_batches_and_its_evaluation(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(cstar, "train_epoch", lambda model, batches, *_, **more: (
        begun.append((model.conv1.weight.detach().clone(), next(batches)[1])), dict(loss=0.0))[1])
    monkeypatch.setattr(common, "evaluate", judge := Mock(side_effect=Stop))
    for seed in (0, 7):
        with pytest.raises(Stop):
            tiny(tmp_path / str(seed), f"--seed {seed} --admm-epochs 0 --finetune-epochs 0", evaluate=True)
        assert judge.call_args.kwargs["seed"] == seed
    with pytest.raises(Stop):
        flags = "--relax-epochs 0 --finetune-epochs 0 --noise 0.1 --eot 2"
        tiny(tmp_path / "noisy", flags, script=binary_relax, evaluate=True)
    assert judge.call_args.kwargs == dict(epsilon=0.2, step_size=0.2, num_steps=3, restarts=1, seed=0, eot=2,
                                          extra_metrics=judge.call_args.kwargs["extra_metrics"])
    (weight, labels), (other, others) = begun[0], begun[2]
    assert not torch.equal(weight, other) and not torch.equal(labels, others)


def test_latency_is_the_least_in_milliseconds_in_the_order_of_the_models(real_latency, monkeypatch):
    """By a clock that the models themselves move; the first pass of each is not counted, most are slow."""
    def model(seconds):
        spent = itertools.chain([0.01], itertools.cycle([3 * seconds, seconds, 2 * seconds]))
        return lambda x: sizes.append(len(x)) or clock.append(clock[-1] + next(spent))
    clock, sizes = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    network = dict(channels=1, size=(2, 2))
    assert real_latency([model(0.25), model(0.125)], network, 7, "cpu") == [250.0, 125.0]
    assert set(sizes) == {7}
    monkeypatch.setattr(torch.cuda, "synchronize", wait := Mock())               # after each pass on a GPU
    sizes.clear()
    real_latency([model(0.25), model(0.125)], network, 7, "meta")
    assert wait.call_count == len(sizes)


@pytest.mark.parametrize("script, more, saves", [
    (cstar, "", 9), (admm_prune, "--rho-growth 2", 9), (hydra_prune, "", 9), (binary_relax, "--noise 0.1", 9),
    (binary_relax, "--finetune-lr 0.03", 9),
    (cstar, "photos", 7), (hydra_prune, "--objective mixtrain --arch cnn_small --mix-images 2", 9)])
def test_resume_equals_the_whole_run_bit_for_bit(whole, zoo, tmp_path, script, more, saves):
    """Stopped right after every checkpoint: before, within and at the end of each of the three phases."""
    more = zoo if more == "photos" else [more]
    how = dict(evaluate=script is cstar)                         # one script is enough for the evaluation
    (folder, wanted), run = whole(script, *more, **how), tmp_path / "run"
    for i in range(saves):
        stopped(1, lambda: tiny(run, *more, "--resume" * (i > 0), script=script))
        torch.manual_seed(12345)                                 # whatever came between
    elsewhere = [] if more is zoo else ["--data-dir", tmp_path, "--workers 3"]
    found = tiny(run, *more, *elsewhere, "--resume", script=script, **how)
    assert torch.backends.cudnn.allow_tf32 == ("mixtrain" not in more[0])
    assert torch.get_float32_matmul_precision() == "highest"
    assert all(found[k] == wanted[k] for k in {"residual", "kept", "mask_changed"} & wanted.keys())
    assert all(same_weights(folder / name, run / name) for name in ("model.pt", "dense.pt"))
    lines = [[{k: v for k, v in line.items() if k not in ("seconds", "output")} for line in log_of(f)]
             for f in (folder, run)]
    assert lines[1] == lines[0]


def test_what_is_computed_once_is_a_copy_as_a_continued_run_gets_it_and_no_batch_comes_between_phases():
    run, w, calls = Mock(computed={}, phase=None), torch.ones(2), []
    for _ in range(3):                                           # it keeps neither w nor what it gave
        found = common.Run.compute_once(run, "w", lambda: calls.append(1) or {"w": w})
        assert found["w"].tolist() == run.computed["w"]["w"].tolist() == [1, 1]
        found["w"] *= 2
        w += 1
    assert len(calls) == 1
    with pytest.raises(TypeError, match="compute_once.'a'. can hold plain .* not numpy"):
        common.Run.compute_once(run, "a", lambda: [np.float64(1)])
    with pytest.raises(RuntimeError, match="between phases: data.batches"):
        common.Run.batches(run)


def test_resume_of_a_finished_run_prints_its_result_or_evaluates_otherwise(finished, tmp_path):
    (folder, before), run, dense = finished, tmp_path / "run", finished[0] / "dense.pt"
    assert tiny(folder, "--resume") == json.loads(json.dumps(before))
    for more, words in (("", "finished"), ("--seed 1", "different run.*seed"),
                        ("--rho 0.5", "different run.*rho")):
        fails(2, words, tiny, folder, more)
    shutil.copytree(folder, run)
    (run / "result.json").unlink()                               # as if it had been stopped just before, and
    for part in (0, 1):                                          # other images, other labels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cstar, "load_data", lambda args: (
                data := common.load_data(args), data.train[part].copy_(data.train[part].flip(0)))[0])
            fails(2, "other training images or labels", tiny, run, "--resume")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(common, "print", lambda *words, file=sys.stdout, **more: print(
            *words, file=closed if words[0] == "phase:final" else file, **more), raising=False)
        closed = Mock(write=Mock(side_effect=BrokenPipeError))
        tiny(run, "--resume", evaluate=True)                     # the result is in its file before it is told
    assert log_of(run)[-1]["phase"] == "final" and (run / "result.json").is_file()
    (run / "result.json").unlink()
    last = torch.load(run / "last.pt", weights_only=True)        # the log's last lines had been lost
    torch.save(last | dict(log_size=10**30), run / "last.pt")
    result = tiny(run, "--restarts 3 --eval-steps 4 --resume", evaluate=True)
    assert result["latency_ms"] == {f"batch_{n}": dict(
        dense=n * result["dense_parameters"], compact=n * result["parameters"]) for n in (1, 128)}
    assert result["attack"] | dict(restarts=3, num_steps=4) == result["attack"]
    assert result["args"]["restarts"] == log_of(run)[-2]["restarts"] == 3
    assert result["seconds"] | dict(final=0) == before["seconds"] | dict(final=0)        # of all sessions
    assert result["clean_acc"] == before["clean_acc"] and same_weights(folder / "model.pt", run / "model.pt")
    result = tiny(tmp_path / "new", "--pretrained", dense, "--pretrain-epochs 0 --ratio 1", evaluate=True)
    assert same_weights(dense, tmp_path / "new/dense.pt") and phases_of(tmp_path / "new") == [0, 2, 2]
    assert result["dense"] == before["dense"] and result["params_ratio"] == 1
    assert set(result["ranks"].values()) == {None}               # at ratio 1 layers stay dense


@every_script
def test_compiled_networks_learn_what_plain_ones_do(tmp_path, monkeypatch, script):
    compiled, compile_ = [], nn.Module.compile
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "cc" else None)
    ends(2, "needs a C.. compiler", script.main, "--dataset digits --compile")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(nn.Module, "compile", lambda model: (          # traced, but run without a compiler
        compiled.append(model), compile_(model, backend="eager")))
    arch = "" if script is binary_relax else "--arch lenet --width 4"        # sooner traced than ResNet-18
    for name, more in (("plain", ""), ("compiled", "--compile")):
        tiny(tmp_path / name, "--amp off", arch, more, script=script)
    assert len(compiled) >= 1 + (script is not binary_relax)         # the cut network too
    plain, other = ([row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in (
        "plain", "compiled"))
    assert plain == pytest.approx(other, rel=1e-4)


def test_all_networks_of_a_process_are_compiled(monkeypatch):
    """Each is in every phase and mode another graph, of which torch by itself makes eight."""
    graphs, compile_, args = [], nn.Module.compile, digits_args(cstar)
    args.compile = True
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_(
        model, backend=lambda graph, _: graphs.append(1) or graph))
    torch._dynamo.reset()
    for _ in range(12):
        common.prepare(linear(conv_weight(10, 64).float()), args)(torch.rand(2, 1, 8, 8))
    assert len(graphs) == 12


AMP = f"--amp {'off' if common.bfloat16_is_fast('cpu') else 'on'}, "
FLAGS = {                                                        # base + flag; others have tests of their own
    cstar: AMP + "--admm-epochs 0, --rank-rule uniform, --budget macs, --rho 0.1, --hooi 2, --admm-lr 0.001, "
           "--weight-decay 0.1, --momentum 0.5",
    admm_prune: AMP + "--rho 5, --rho-growth 2, --rho-growth 9 + --rho-max 4, --group-residual, --ratio 3, "
                "--admm-rise 0, --momentum 0.5, --weight-decay 0.1",
    hydra_prune: AMP + "--objective trades",
    binary_relax: AMP + "--members 2, --depth 14, --momentum 0.5, --weight-decay 0.1"}


@pytest.mark.parametrize("script, flags", [(s, flags) for s in SCRIPTS for flags in FLAGS[s].split(", ")])
def test_flags_do_something(whole, tmp_path, script, flags):
    (base, _, more), run = flags.rpartition("+"), tmp_path / "run"
    base = f"--train-images 64 {base}"
    found = tiny(run, base, more, script=script)
    assert not same_weights(whole(script, base, evaluate=False)[0] / "model.pt", run / "model.pt")
    if script is cstar:
        rhos = {"--admm-epochs": None, "--rho": 0.1, "--admm-lr": 150, "--momentum": 7.5}
        rho = rhos.get(more.split()[0], 1.5)                     # 3 (1 - momentum) / (rate * 2 steps)
        assert found["rho"] == (rho and pytest.approx(rho))


@pytest.mark.parametrize("script", [cstar, admm_prune])
@pytest.mark.parametrize("residuals, told", [
    ([0.5, 0.2, 0.4], True), ([0.5, 0.2, 0.21], False), ([0.2, 0.1, 0.12], True), ([0.5, 0.3, 0.3], True)])
def test_admm_that_did_not_converge_is_told(script, residuals, told, tmp_path, monkeypatch):
    def update(admm):
        admm.residuals.append(residuals[len(admm.residuals)])
        return admm.residuals[-1] if script is cstar else (admm.residuals[-1], 0.0)
    monkeypatch.setattr(script.ADMM, "update", update)
    monkeypatch.setattr(script, "train_epoch", lambda *_, **more: dict(loss=0.0))
    result = tiny(tmp_path / "run", UNTRAINED, "--admm-epochs 3", script=script)
    assert result["residual"] == residuals[2]
    assert any("ADMM did not converge" in line.get("note", "") for line in log_of(tmp_path / "run")) == told


def spawn(*command, cwd=HERE, **more):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def test_evaluate_at_another_radius_takes_steps_in_proportion_and_calls_other_judges(tmp_path):
    file, natural = SHIPPED / "model.pt", tmp_path / "natural.pt"
    artifact, quarter = torch.load(file, weights_only=True), tmp_path / "quarter.pt"
    for path, epsilon, step_size in ((natural, 0.0, 0.0), (quarter, 0.4, 0.1)):      # 0: without attack
        artifact["attack_settings"] |= dict(epsilon=epsilon, step_size=step_size)
        torch.save(artifact, path)
    flags = "--eval-images 10 --eval-steps 1 --restarts 1 --device cpu --epsilon"
    others = ("0.1 --eval-step-size 0.03 --losses margin --smoothing 0.1 --smoothing-images 10 "
              "--smoothing-draws 100")
    found = [judges.main(argv_of(path, flags, more)) for path, more in (
        (file, "0.2"), (file, "0.1"), (natural, "0.1"), (quarter, "0.2"), (quarter, "0"))]
    found.append(judges.main(argv_of(file, flags, others, "--source", file)))
    assert [one["attack"]["step_size"] for one in found] == [0.2, 0.1, 0.1, 0.05, 0, 0.03]
    assert found[4]["robust_acc"] == found[4]["clean_acc"]       # at radius 0
    assert {one["kind"] for one in found} == {"compact"} and found[5]["attack"]["losses"] == ["margin"]
    assert found[5]["transfer_acc"] <= found[5]["clean_acc"] and found[5]["smoothed"]["draws"] == 100


def test_evaluate_passes_its_flags_on_and_a_transfer_that_is_stronger_than_pgd_is_a_flag(monkeypatch):
    given = dict(evaluate=dict(robust_acc=50.0, images=9), sanity_flags=[], smoothing_curve={}, transfer=50,
                 autoattack=(40.0, "standard"))
    asked = {name: Mock(return_value=value) for name, value in given.items()}
    for name, mock in asked.items():
        monkeypatch.setattr(judges, name, mock)
    monkeypatch.setattr(judges.importlib.util, "find_spec", lambda name: True)
    file = SHIPPED / "model.pt"
    flags = ("--losses ce --constant-step --eval-step-size 0.03 --epsilon 0.1 --eval-steps 7 --seed 5 "
             "--restarts 2 --eot 3 --smoothing 0.5 --smoothing-images 9 --smoothing-draws 300 "
             "--eval-images 10 --device cpu --autoattack --source")
    found = judges.main(argv_of(file, flags, file))
    assert (found["autoattack_acc"], found["autoattack_ci"]) == (40.0, common.interval(40.0, 9))
    attack = dict(epsilon=0.1, step_size=0.03, num_steps=7, seed=5, eot=3, anneal=False)
    assert {name: mock.call_args.kwargs for name, mock in asked.items()} == dict(
        evaluate=attack | dict(restarts=2, losses=["ce"]), sanity_flags=attack, transfer=attack,
        smoothing_curve=dict(sigma=0.5, count=9, draws=300, classes=10, seed=5),
        autoattack=dict(epsilon=0.1, seed=5))
    found = judges.main(argv_of(file, "--smoothing 0.5 --eval-images 10 --device cpu"))
    assert asked["smoothing_curve"].call_args.kwargs | dict(count=100, draws=10000) == (
        asked["smoothing_curve"].call_args.kwargs)               # as --help says
    assert asked["evaluate"].call_args.kwargs["losses"] == ["ce", "margin"]
    assert (found["dataset"], found["bytes"]) == ("digits", os.path.getsize(file))
    ends(2, "--losses: 2 need as many --restarts", judges.main, file, "--losses ce margin --restarts 1")
    with monkeypatch.context() as patch:
        patch.setattr(judges, "load_data", Mock(return_value=common.Data((), (), ["a", "b", "c"])))
        patch.setattr(judges, "check_fit", Mock())
        ends(2, "four classes or more, and digits has 3", judges.main, file, "--autoattack")
    monkeypatch.setattr(judges.importlib.util, "find_spec", lambda name: None)
    ends(2, "pyautoattack is not installed", judges.main, file, "--autoattack")
    asked["evaluate"].return_value = dict(robust_acc=50.0, images=1000)
    for accuracy, flags in ((47.9, ["transfer is stronger than PGD"]), (48.1, []), (60.0, [])):
        asked["transfer"].return_value, asked["sanity_flags"].return_value = accuracy, []
        found = judges.main(argv_of(file, "--source", file, "--eval-images 10 --device cpu"))
        assert found["flags"] == flags and found["transfer_acc"] == accuracy


def test_a_forked_script_in_another_folder_makes_files_of_its_own(tmp_path):
    for name in ("common.py", "cstar.py", "data/digits.npz", "tools/evaluate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / name, tmp_path / name.replace("cstar", "mine"))
    script = (tmp_path / "mine.py").read_text()                  # with a network of its own, as README tells
    (tmp_path / "mine.py").write_text(script.replace("\nimport torch\n", """
import common
import torch
common.NETWORKS["mine"] = lambda width, channels, classes, size: nn.Sequential(
    nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, classes))
""", 1))
    flags = "--arch mine --ratio 2 --finetune-epochs 0 --output there"
    run = spawn("mine.py", *argv_of(TINY, flags), cwd=tmp_path)
    assert run.wait(180) == 0, run.stderr.read()
    (tmp_path / "elsewhere").mkdir()
    command = ["../tools/evaluate.py", "../there/model.pt", "--eval-images", 40, "--device", "cpu"]
    again = json.loads(spawn(*command, cwd=tmp_path / "elsewhere").communicate(timeout=180)[0])
    result = json.loads((tmp_path / "there/result.json").read_text())
    shared = ("script", "clean_acc", "robust_acc", "attack")
    assert again["script"] == "mine" and all(again[k] == result[k] for k in shared)
    (tmp_path / "elsewhere/mine.py").write_text("raise SystemExit('not this one')")
    code = "import sys; sys.path.append('..'); import common; common.load_model('../there/model.pt')"
    assert spawn("-c", code, cwd=tmp_path / "elsewhere").wait(60) == 0
    assert result["dense_parameters"] == 80 + 584 + 90 > result["parameters"]
    assert all(ms > 0 for pair in result["latency_ms"].values() for ms in pair.values())


def test_signal_stops_at_once_and_says_how_to_continue(tmp_path):
    (tmp_path / "last.pt.tmp").touch()                           # of a process that was killed
    process = spawn("cstar.py", *argv_of(TINY, "--pretrain-epochs 500 --output", tmp_path))
    next(line for line in process.stdout if "epoch:1 " in line)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143 and errors.count("\n") == 1 and "--resume" in errors
    assert common.read_file(tmp_path / "last.pt")["phase"] == "pretrain"
    assert not [*tmp_path.glob("*.tmp")]


def test_progress_counts_to_its_total_and_tells_the_time_that_is_left(digits, monkeypatch):
    model, seconds = linear(conv_weight(10, 64).float()), itertools.count()
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    with contextlib.redirect_stderr(Terminal()) as errors:
        assert list(common.progress("abcd", "letters", 4, 7198)) == list("abcd")
        common.evaluate(model, digits.test, epsilon=0.1, step_size=0.1, num_steps=1, restarts=2)
    lines = re.findall(r"K(\w[\w /]*): (\d+)/(\d+)(.*?)\r", errors.getvalue())
    assert (lines[1], errors.getvalue()[-4:]) == (("letters", "2", "4", ", 4:00:02 to go"), "\r\033[K")
    counts = (("letters", 4), ("attack 1/2", 2), ("attack 2/2", 2))          # two batches
    assert [line[:3] for line in lines] == [
        (label, str(i), str(total)) for label, total in counts for i in range(1, total + 1)]


# ---------------------------------------------------------------- wrong input
def run_cli(main, *argv, stderr=io.StringIO):
    before, out = signal.getsignal(signal.SIGTERM), contextlib.redirect_stdout(io.StringIO())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop, out:
        patch.setattr(sys, "argv", ["cstar.py", *argv_of(*argv)])
        with contextlib.redirect_stderr(stderr()) as errors:
            common.cli(main)
    signal.signal(signal.SIGTERM, before)
    return stop.value.code, errors.getvalue()


def ends(status, words, main, *argv):
    """main, with these arguments, ends with this status and one line, which has these words."""
    found, errors = run_cli(main, *argv)
    assert found == status and errors.count("\n") == 1 and re.search(words, errors), errors


def test_whatever_ends_a_program_is_one_line(tmp_path, monkeypatch):
    def interrupted():
        for _ in common.progress(range(3), "pretrain 1/2", 3):
            raise KeyboardInterrupt
    flags = "--lr 10 --weight-decay 1 --pretrain-epochs 50 --output"
    ends(1, r": pretrain \d+/50: .*diverged", cstar.main, TINY, flags, tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists()
    monkeypatch.setattr(common.Run, "active", common.Run)
    status, errors = run_cli(interrupted, "--seed 3", stderr=Terminal)
    assert status == 130 and errors.count("\n") == 1
    assert errors.rpartition("\r\033[K")[2].startswith("cstar.py: stopped") and "--seed 3 --resume" in errors
    full = Mock(side_effect=[RuntimeError("CUDA error: out of memory"), RuntimeError(
        "GET was unable to find an engine to execute this computation"), RuntimeError(       # cuDNN's word
        "CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError("DataLoader worker (pid 7) is killed: Killed.")])
    for main in (lambda: torch.empty(10**15), lambda: np.empty(10**15), full, full, full, full):
        ends(1, r"out of memory \(.*(CUDA|engine|allocate|CUBLAS|worker)", main)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):                       # a bug is seen whole
        common.cli(lambda: 1 / 0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(os, "dup2", closed := Mock())              # `| head` has ended
        common.cli(Mock(side_effect=BrokenPipeError))
    assert stop.value.code == 141 and closed.called
    signal.signal(signal.SIGTERM, before)
    unread = Mock(flush=Mock(side_effect=BrokenPipeError))       # or it ends before the last lines are out
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(os, "dup2", Mock())
        with contextlib.redirect_stdout(unread):
            common.cli(lambda: None)
    assert stop.value.code == 141
    signal.signal(signal.SIGTERM, before)
    with pytest.raises(TypeError, match="JSON"):                 # a fork's, before the evaluation
        common.Run.finish(Mock(), mine=torch.ones(2))
    assert common.Parser(None).description == ""                 # a fork without a docstring
    with monkeypatch.context() as two, pytest.raises(common.Fault, match="reach .Cuda failure 2"):
        two.setattr(common, "world", lambda: 2)
        with pytest.raises(torch.OutOfMemoryError):              # this process's own, not the other's
            common.sync(Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        common.sync(Mock(side_effect=RuntimeError("NCCL error in: a.cpp:1\nLast error:\nCuda failure 2")))
    for place in ("/src/Loss.cpp:12, ", "[/src/pair.cc:545] ", "[enforce fail at x.cc:9] . "):
        assert common.first_line(RuntimeError(f"{place}wrong")) == "wrong"
    unreachable = Mock(side_effect=OSError("Network is unreachable"))
    monkeypatch.setattr(pytest.importorskip("torchvision.datasets"), "CIFAR10", unreachable)
    ends(1, "unreachable.*--dataset digits", cstar.main, "--data-dir", tmp_path)


REFUSED = {                                                      # {script: {said of the first flag: flags}}
    cstar: {
        "is not a": "--epsilon nan, --lr inf, --lr 0, --epsilon 8/0, --ratio 0.5, --width 1.5, --seed -1",
        "8 is not.*0 to 1.*8/255": "--epsilon 8", "1 is not.*from 2": "--batch-size 1",
        "invalid choice": "--arch resnet, --rank-rule best", "unrecognized": "--eps 0.1",
        "500 is not from": "--ratio 500", "too deep.*8x8": "--arch vgg16", "361.*360": "--eval-images 361",
        "5 is not": "--train-images 5", "3 is more": "--ramp-epochs 3 --pretrained x.pt",
        "is none of": "--device cuda:77, --device gpu", "no file nowhere.pt": "--pretrained nowhere.pt",
        "not with --pretrained": "--pretrain-epochs 3 --pretrained x.pt", "1 numbers each": "--mean 0.5",
        "names no file": "--pretrained '', --output ''", "colour images": "--arch imagenet_resnet18",
        "mydata.*--epsilon": "--dataset mydata", "no folder": "--dataset mydata --epsilon 8/255",
        "does nothing": "--rho 1 --admm-epochs 0, --admm-lr 1 --admm-epochs 0, "
                        "--finetune-lr 1 --finetune-epochs 0"},
    admm_prune: {"not with --ratio.* 4, the width": "--target-width 2 --ratio 2, --target-width 8",
        "needs --target-width": "--mode scratch, --mode scratch --target-width 2 --scheme column",
        "goes with": "--ticket x.pt, --mode ticket", "no file": "--ticket nowhere.pt --mode ticket",
        "is more than": "--admm-interval 7", "from initial": "--pretrained x.pt --mode scratch "
        "--target-width 2, --pretrained x.pt --mode ticket --ticket x.pt",
        "adds no": "--group-residual --arch lenet",
        "is for": "--group-residual --scheme column, --group-residual --mode scratch --target-width 2",
        "invalid choice": "--scheme kernel", "0.5 is not": "--rho-growth 0.5",
        "--rho-max is": "--rho-growth 2 --rho 20, --rho-growth 2 --rho 10, --rho-growth 1.3 --rho-max 0.1",
        "does nothing": "--rho-max 2, --rho-growth 1 --rho-max 2, --admm-rise 0.1 --mode post, "
                        "--admm-interval 2 --admm-epochs 0, "
                        "--rho-growth 2 --mode post, --rho 1 --mode post, --admm-lr 1 --admm-epochs 0, "
                        "--finetune-lr 1 --mode ticket --ticket x.pt, --finetune-lr 1 --finetune-epochs 0"},
    hydra_prune: {"is for": "--objective crown-ibp --arch resnet18, --objective mixtrain --arch resnet18",
        "float32, without torch.compile": "--objective crown-ibp --amp on, --objective mixtrain --compile",
        "invalid choice": "--scores random, --scheme column", "2 is not": "--final-share 2",
        "99 is more than the 15": "--ramp-epochs 99", "0 is not": "--sigma 0, --mix-images 0",
        "trains with Adam": "--momentum 0.9 --objective mixtrain, --momentum 0.5 --objective crown-ibp",
        "does nothing": "--mix-images 3, --beta 1, --beta 1 --objective mixtrain, --sigma 1 --objective "
                        "trades, --final-share 1 --objective smooth, --ramp-epochs 1 --objective smooth, "
                        "--prune-lr 1 --scores lwm, --prune-lr 1 --prune-epochs 0, --finetune-lr 1 "
                        "--finetune-epochs 0"},
    binary_relax: {"invalid choice": "--bits 3",
        "without adversarial": "--ramp-epochs 3 --adv-weight 0, --num-steps 2 --adv-weight 0",
        "unrecognized": "--ratio 4", "depth.*6 b": "--depth 21",
        "is not a": "--adv-weight -1, --members 0, --noise nan", "no meaning": "--method bc --bits 32",
        "3 is more": "--ramp-epochs 3 --pretrained none.pt", "is for networks": "--eot 3 --noise 0",
        "enresnet": "--noise 0.1 --arch lenet, --depth 20 --arch resnet18, --members 2 --arch resnet18",
        "both": "--nat-weight 0 --adv-weight 0", "none.pt": "--pretrained none.pt",
        "does nothing": "--finetune-lr 1 --finetune-epochs 0, --relax-lr 1 --finetune-lr 1 --relax-epochs 0, "
                        "--relax-lr 1 --relax-epochs 0 --finetune-epochs 0"},
    judges: {"does nothing": "--smoothing-draws 200 x.pt, --smoothing-images 9 x.pt",
             "needs --eval-step-size": "--constant-step x.pt"}}


def test_defaults_are_the_papers_and_the_evaluation_is_stronger_than_the_training():
    keys = ("epsilon", "step_size", "num_steps", "eval_step_size", "eval_steps", "restarts")
    for name, wanted in (("cifar10", [8 / 255, 2 / 255, 10, 8 / 255, 50, 4]),
                         ("mnist", [0.3, 0.01, 40, 0.3, 50, 4]), ("digits", [0.2, 0.05, 10, 0.2, 50, 4]),
                         ("imagenet", [4 / 255, 2 / 255, 3, 4 / 255, 50, 4])):
        args = [script.get_args(["--dataset", name, "--device=cpu"]) for script in SCRIPTS[:3]]
        assert [[getattr(a, key) for key in keys] for a in args] == [wanted] * 3
        assert [a.finetune_lr / a.lr for a in args] == [1] * 3
        compressing = [getattr(a, f"{phase}_lr") / a.lr for a, phase in zip(args, PHASE.values())]
        assert compressing == [1, 0.5, 1]
    for script, flags, wanted in (
            (cstar, "digits --epsilon 0.1", dict(width=4, step_size=0.025)),     # in proportion, if not given
            (cstar, "digits --epsilon 1", dict(step_size=0.25)),
            (cstar, "digits --epsilon 0.1 --step-size 0.2", dict(step_size=0.2)),
            (cstar, "mnist --pretrain-epochs 3", dict(ramp_epochs=3)),
            (admm_prune, "cifar10", dict(
                ratio=4, scheme="filter", rho_growth=1, rho_max=10, admm_interval=1)),
            (admm_prune, "cifar10 --target-width 2", dict(ratio=8)),
            (admm_prune, "digits --target-width 4 --admm-epochs 3 --admm-interval 3", dict(ratio=1)),
            (admm_prune, "cifar10 --arch vgg16", dict(lr=0.2)),
            (admm_prune, "cifar10 --arch lenet", dict(lr=0.05)),                 # at 0.2 it learns nothing
            (admm_prune, "cifar10 --arch lenet --lr 0.2", dict(lr=0.2)),
            (admm_prune, "digits --arch cnn_large", dict(lr=0.1)),
            (hydra_prune, "mnist", dict(ramp_epochs=10, scores="hydra")),
            (hydra_prune, "mnist --objective natural", dict(ramp_epochs=0)),     # it has no radius
            (hydra_prune, "mnist --objective smooth", dict(
                ramp_epochs=0, sigma=0.25, beta=6, num_steps=None)),
            (hydra_prune, "cifar10 --objective trades", dict(beta=6)),
            (hydra_prune, "mnist --objective crown-ibp", dict(ramp_epochs=15, final_share=0)),
            (hydra_prune, "digits --objective crown-ibp --epsilon 0.05", dict(epsilon=0.05)),
            (hydra_prune, "cifar10 --objective mixtrain", dict(epsilon=2 / 255)),
            (hydra_prune, "digits --objective mixtrain --arch cnn_large", dict(mix_images=1)),
            (hydra_prune, "mnist --objective mixtrain", dict(epsilon=0.1, width=16, lr=1e-3, batch_size=128)),
            (hydra_prune, "digits --objective mixtrain", dict(
                arch="cnn_small", width=16, epsilon=0.02, lr=1e-3, batch_size=64, amp=False, mix_images=5,
                step_size=None, num_steps=None, momentum=None, pretrain_epochs=60, prune_epochs=20,
                finetune_epochs=40, ramp_epochs=30)),                            # None: nothing reads it
            (binary_relax, "cifar10", dict(
                bits=2, method="br", adv_weight=8, nat_weight=1, noise=0.1, depth=20, members=1, width=16,
                relax_epochs=24, finetune_epochs=16, eval_steps=20, eot=10)),
            (binary_relax, "cifar10 --noise 0", dict(eval_steps=50, eot=None)),
            (binary_relax, "mnist --adv-weight 0", dict(ramp_epochs=0, num_steps=None)),
            (binary_relax, "digits --arch resnet18", dict(width=4))):
        args = vars(script.get_args(["--device", "cpu", "--dataset", *flags.split()]))
        assert {key: args[key] for key in wanted} == pytest.approx(wanted), flags


@pytest.mark.parametrize("script, words, flags", [(script, words, flags) for script, said in REFUSED.items()
                                                  for words in said for flags in said[words].split(", ")])
def test_wrong_flags_are_one_line_exit_2_and_write_nothing(tmp_path, monkeypatch, script, words, flags):
    monkeypatch.chdir(tmp_path)
    ends(2, f"(?=.*{flags.split()[0]}).*{words}", script.main, "--dataset digits", flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [
    lambda data: data.replace(b"layer1", b"layer3", 1), lambda data: data[:-100], lambda data: b"",
    lambda data: b"<html>404</html>", lambda data: pickle.dumps(Hostile())])
@pytest.mark.parametrize("name", ["model.pt", "last.pt"])
def test_damaged_files_are_refused(finished, tmp_path, monkeypatch, damage, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(damage((finished[0] / name).read_bytes()))
    if name == "model.pt":
        ends(1, "damaged", judges.main, name)
        ends(1, "there is no file nowhere.pt", judges.main, "nowhere.pt")
        ends(1, r"\[Errno 21\]|Permission", judges.main, ".")       # a folder: not damaged
    else:
        ends(1, "damaged", cstar.main, TINY, "--output . --resume")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_of_other_content_are_refused(whole, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                  # where "hacked" would be
    path, pruned = tmp_path / "changed.pt", common.read_model(whole(admm_prune)[0] / "model.pt")[0]
    relaxed = common.read_model(whole(binary_relax)[0] / "model.pt")[0]
    good = common.read_model(finished[0] / "model.pt")[0]
    values, shapes = good["values"], good["shapes"]
    for words, *changes in [
            ("a script", dict(script="tools/bench")), ("not beside", dict(script="nothing_here")),
            ("damaged or not.*format 1", dict(format=1)), ("not finite", dict(values=values * math.nan)),
            ("damaged or not", dict(shapes=[1]), dict(values=[1.0]), dict(hostile=Hostile())),
            ("does not fit the network it names", dict(network={}), dict(counters={"a": 1}),
             dict(shapes=shapes | {"bn1.weight": "x"}), dict(shapes=shapes | {"bn1.weight": [0, 4]}),
             dict(network=good["network"] | {"width": 2}), dict(bits=torch.zeros(3, dtype=torch.uint8)),
             dict(ranks=good["ranks"] | {"layer4.1.conv2": (7, 5)})),
            ("codes are missing", relaxed | dict(codes=relaxed["codes"][:-1])),
            ("codes too many", relaxed | dict(codes=relaxed["codes"].repeat(2))),
            ("wrong number of classes", pruned | dict(network=pruned["network"] | {"classes": 9}))]:
        for change in changes:
            torch.save(good | change, path)
            fails(1, words, common.load_model, path)
    assert os.listdir(tmp_path) == ["changed.pt"]


def test_files_that_cannot_be_read_back_are_refused_at_once(finished, tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(finished[0], run)
    (run / "result.json").write_text('{"args"')
    ends(1, "result.json does not fit a run", cstar.main, TINY, "--output", run)
    (run / "result.json").unlink()
    ends(1, "not the file wanted here .*lacks: kind, network", judges.main, run / "last.pt")
    last = torch.load(run / "last.pt", weights_only=True)
    for status, words, *changes in (
            (1, "last.pt", dict(phase="prune"), dict(epoch=3), dict(epoch=-1), dict(epoch="1"),
             dict(random={}), dict(states={}), dict(states=dict(model={}, optimizer=3, schedule=None))),
            (2, "was not begun on cpu", dict(random=last["random"] | dict(cuda=torch.zeros(1)))),
            (2, "different run .lr differ", dict(args=last["args"] | dict(lr=torch.ones(2))))):
        for change in changes:
            torch.save(last | change, run / "last.pt")
            ends(status, words, cstar.main, TINY, "--output", run, "--resume")
    args = cstar.get_args(argv_of(TINY, "--output", new))
    for script in ("my-cstar.py", "/elsewhere/nothing_here.py"):
        fails(2, "beside common.py", common.Run, args, None, script, {}, [])
    network = dict(arch="lenet", width=1, channels=1, classes=7, size=[8, 8])
    common.save_model(tmp_path / "7.pt", "cstar", "dense", network, common.build_network(**network), args)
    ends(2, "--source", judges.main, run / "model.pt", "--source", tmp_path / "7.pt")
    assert not new.exists()
    for value in (np.float64(1), np.ones(2), torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="new.pt can hold plain .* not (numpy|torch)"):
            common.save_file(tmp_path / "new.pt", dict(computed={"a": [value]}))
    assert not [*tmp_path.glob("new*")]


@pytest.mark.parametrize("spoil, words", [
    (lambda root: (root / "train/ant/0.png").write_text("no image"), "ant/0.png cannot be read"),
    (lambda root: (root / "test/ant/0.png").write_bytes(b"P5 20000 20000 255\n"), "ant/0.png can.*bomb"),
    (lambda root: write_images(root / "x", size=(4, 4))
     or os.replace(root / "x/train/ant/0.png", root / "test/bee/0.png"), "bee/0.png has 4x4 pixels, .*8x8"),
    (lambda root: (root / "test/ant/nested").mkdir(), "ant/nested cannot be read"),
    (lambda root: (root / "train/bee/gone.png").symlink_to("nowhere"), "gone.png cannot be read"),
    (lambda root: [(root / "test" / f"{i:030}").mkdir() for i in range(300)], "^.{0,400}\n$"),
    (lambda root: [p.unlink() for p in (root / "test/bee").iterdir()], "bee holds no images"),
    (lambda root: (root / "test/bee").rename(root / "test/wasp"), "class folders.*wasp"),
    (lambda root: (root / "test").rename(root / "held-out"), "class folders")])
def test_bad_class_folders_are_one_sentence(tmp_path, spoil, words):
    write_images(tmp_path / "zoo")
    spoil(tmp_path / "zoo")
    flags = "--dataset zoo --epsilon 0.1 --data-dir"
    ends(1, words, cstar.main, flags, tmp_path, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_is_whole_or_what_it_was_after_a_signal_and_on_a_full_disk(tmp_path, monkeypatch):
    path, written, stops = tmp_path / "f.pt", torch.save, (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(sent, Mock(side_effect=Stop)) for sent in stops]
    for sent in stops:                                           # takes effect when the file is there
        with pytest.raises(Stop), monkeypatch.context() as patch:
            patch.setattr(torch, "save", lambda *args: (signal.raise_signal(sent), written(*args)))
            common.save_file(path, dict(a=int(sent)))
        assert common.read_file(path)["a"] == sent
    for sent, handler in zip(stops, before):
        signal.signal(sent, handler)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(common.Fault, match="No space.*MiB are free"), common.ThreadPoolExecutor(1) as pool:
        pool.submit(common.save_file, path, dict(a=0)).result()  # in another thread, which sets no handlers
    assert common.read_file(path, a=int)["a"] == signal.SIGTERM and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("steps", range(1, 12))
def test_rate_rises_and_falls_over_any_number_of_steps(steps):
    args, x, rates = digits_args(cstar, "--batch-size 2"), torch.zeros(2 * steps), []
    data = common.Data((x, x), None, [])
    optimizer, schedule = common.make_optimizer(linear(torch.ones(2, 2)), 1.0, 1, data, args)
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True) and 0.02 < max(rates) <= 1
    if steps == 9:
        assert rates[:2] == pytest.approx([0.04, 1]) and rates[8] < 0.05 and optimizer.defaults["nesterov"]
        falling, _ = common.make_optimizer(linear(torch.ones(2, 2)), 1.0, 1, data, args, rise=0.0)
        assert falling.param_groups[0]["lr"] > 0.95


def test_training_is_in_bfloat16_where_the_hardware_multiplies_it(monkeypatch):
    for name, wanted in (("avx512_f", False), ("avx512_bf16", True), ("amx_tile", True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
        assert [cstar.get_args(["--device=cpu", f"--amp={amp}"]).amp for amp in ("auto", "on", "off")] == [
            wanted, True, False]
    for capability, wanted in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(common, "check_device", lambda name: "cuda:0")
        assert cstar.get_args([]).amp == wanted
        refused = pytest.raises(common.UsageFault, match="--amp: on is not")
        with contextlib.nullcontext() if wanted else refused:
            assert cstar.get_args(["--amp", "on"]).amp


def test_numbers_too_small_to_be_normal_become_zero_in_a_run():
    """On CPUs that can do that; else dead weights, which decay towards 0, slow training down."""
    tiny = torch.full((2,), 1e-30)
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush them")
    assert (tiny * 1e-9).view(torch.int32).all()
    digits_args(cstar)
    assert not (tiny * 1e-9).view(torch.int32).any()


def test_two_processes_do_not_share_a_folder(tmp_path):
    fcntl, argv = pytest.importorskip("fcntl"), [cstar.main, TINY, "--output", tmp_path]
    (tmp_path / "log.jsonl").touch()
    with open(tmp_path / "log.jsonl") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ends(2, "another process", *argv)
    for name, content in (("model.pt", ""), ("dense.pt", ""), ("log.jsonl", "one\ntwo\n")):      # someone's
        (tmp_path / name).write_text(content)
        ends(2, "no last.pt", *argv)
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()


# ---------------------------------------------------------------- commands and documents
def write_run(folder, result, dense=(), args=(), **changes):
    Path(folder).mkdir(exist_ok=True)
    result = result | changes | dict(dense=result["dense"] | dict(dense), args=result["args"] | dict(args))
    Path(folder, "result.json").write_text(json.dumps(result))


def test_compare_joins_seeds_and_leaves_out_what_is_damaged(finished, tmp_path, capsys, monkeypatch):
    def compared(*argv):
        compare.main(["zero", "one", *argv])
        return capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    times, kept = dict(dense=6.0, compact=4.0), Path("zero/evaluate-autoattack.json")
    dense_kept = Path("zero/evaluate-autoattack-dense.json")
    same = dict(finished[1], clean_acc=50.0, robust_acc=20.0, bytes=1000, bytes_ratio=8.0,
                latency_ms=dict(batch_1=times, batch_128=times), flags=["twice: 1", "never"])
    found = dict(script=same["script"], bytes=1000, attack=same["attack"], dataset="digits", robust_acc=45.0,
                 autoattack_acc=41.23, autoattack_ci=[27.0, 56.8], images=40)
    write_run("zero", same)
    write_run("one", same, robust_acc=41.0, bytes=3000, bytes_ratio=6.0, flags=["twice: 2"],
              args=dict(seed=1, ratio=4, pretrained=None))
    write_run("torn", same)
    kept.write_text(json.dumps(found))
    dense_kept.write_text(json.dumps(found | dict(bytes=same["dense_bytes"], autoattack_acc=43.21)))
    Path("torn/result.json").write_text('{"script": "cst')
    write_run("odd", same, args=dict(bits=2, finetune_epochs="3"))
    write_run("odder", same, args=dict(admm_epochs=0), seconds=3.5)
    out, errors = compared("torn", "odd", "odder", "absent", "--commands")
    head, _, row, dense, *folded = out.splitlines()
    assert row == ("| low rank, 4x, ADMM | 2,000 (1,000 to 3,000), 7.0x | 50.0 | 30.5 (20.0 to 41.0; 2 seeds)"
                   " | seed 0: 41.2 (27.0 to 56.8); PGD 45.0; 40 images | 1.5 | never; twice |")
    assert dense.startswith(f"| dense | {same['dense_bytes']:,}, 1.0x | {same['dense']['clean_acc']:.1f} |")
    assert "| 43.2 (27.0 to 56.8); PGD 45.0; 40 images |" in dense       # kept in one folder of two with it
    assert len({line.count("|") for line in (head, row, dense)}) == 1 and "AutoAttack" in head
    assert compare.spread([28.5, 29.4]) == "29.0 (28.5 to 29.4)"     # the mean is 28.95; of floats, 28.9
    assert compare.spread([28.5, None]) == ""
    assert re.findall("left out: ([a-z]*) .*\n", errors) == ["torn", "odd", "odder", "absent"]
    assert "zero, one (the first)" in folded[3] and same["command"] in folded[4]
    others = [json.dumps(found | other) for other in (
        dict(bytes=1), dict(dataset="mnist"), dict(script="x"), dict(attack=dict(epsilon=0.3)))]
    kept.unlink()
    assert "| 43.2 (" in compared().out                          # the dense network's alone makes the column
    dense_kept.unlink()
    for damaged, reason in [*((other, "another file") for other in others), ("", "Expecting value")]:
        kept.write_text(damaged)
        out, errors = compared()
        assert reason in errors and "AutoAttack" not in out and "2 seeds" in out
    keys = "latency_ms robust_ci clean_acc nonzeros flags bytes bytes_ratio".split()
    for key, wrong in [("nonzeros", 0), ("command", None), *itertools.product(keys, (None, {}, [1], "x"))]:
        write_run("torn", same, args=dict(seed=2), **{key: wrong})
        assert "left out" in compared("torn").err, (key, wrong)
    for argv, status, words in (
            ("zero zero", 1, "two of one seed, perhaps"), ("torn", 1, "finished run"), ("", 2, "folders"),
            ("--refresh R --commands", 2, "nothing"), ("zero --refresh R", 2, "folders"),
            ("zero --columns bytes,x", 2, "x is not one"),
            ("zero --plot a.txt", 2, "end in"), ("zero --columns bytes" + ",bytes" * 8, 2, "at most 8")):
        found, errors = run_cli(compare.main, argv)
        assert found == status and words in errors
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    ends(2, "matplotlib is not installed", compare.main, "zero --plot a.png")


def test_compare_names_rows_as_a_person_does(finished, tmp_path, capsys, monkeypatch):
    def labels(*folders):
        return {label for label, _ in compare.main(folders)}
    monkeypatch.chdir(tmp_path)
    result, args = finished[1], finished[1]["args"]
    base = {k: args[k] for k in ("dataset", "width", "seed")} | dict(ratio=10.0, finetune_epochs=2)
    admm, hydra = base | dict(scheme="filter", admm_epochs=3), base | dict(scheme="irregular", prune_epochs=2)
    rows = {                                                     # what results/README.md has no row of
        "low rank, 4x, ADMM, epochs=4": args,
        "filters, grouped, 10x, one-shot, epochs=5": admm | dict(mode="post", group_residual=True),
        "filters, width 1 to 1, lottery ticket": admm | dict(mode="ticket", target_width=1,
                                                             finetune_epochs=0),
        "single weights, 10x, lowest magnitudes, TRADES, epochs=4": hydra | dict(
            scores="lwm", objective="trades"),
        "single weights, 10x, lowest magnitudes, epochs=2": hydra | dict(scores="hydra", prune_epochs=0),
        "single weights, 10x, snip, MixTrain, epochs=2": hydra | dict(
            scores="snip", objective="mixtrain", finetune_epochs=0)}     # a fork that moved its epochs
    for i, changed in enumerate(rows.values()):
        write_run(f"run{i}", result | dict(args=changed))
    assert labels("run*") == {*rows, "dense"} and not capsys.readouterr().err
    for seed, more in ((0, {}), (1, dict(admm_rise=0.2, amp=True))):       # a default that older results lack
        write_run(f"aged{seed}", result | dict(args=admm | more | dict(seed=seed)), script="admm_prune")
    assert labels("aged*") == {"filters, 10x, ADMM", "dense"} and "2 seeds" in capsys.readouterr().out
    for seed, unread in ((0, dict(momentum=0.9, num_steps=40)), (1, dict(momentum=None, num_steps=None))):
        write_run(f"bounds{seed}", result | dict(args=hydra | unread | dict(
            scores="lwm", objective="crown-ibp", seed=seed)), script="hydra_prune")
    assert labels("bounds*") == {"single weights, 10x, lowest magnitudes, CROWN-IBP", "dense"}
    for i, amp in enumerate((True, False)):                      # of one seed: two rows
        write_run(f"amp{i}", result, args=dict(amp=amp))
    assert labels("amp*") >= {"low rank, 4x, ADMM, amp=False", "low rank, 4x, ADMM, amp=True"}
    other = {k: v for k, v in args.items() if k != "admm_epochs"} | dict(distill_epochs=3, rank_rule="energy")
    write_run("fork", result | dict(args=other), script="mine")
    assert labels("fork") == {"mine, low rank, energy ranks, 4x, ADMM", "dense"}
    # Added are flags that differ and the attack's losses; all, where names are equal.
    other = result["attack"] | dict(losses=["margin"])
    write_run("other", result, args=dict(momentum=0.5, width=2), dense=dict(clean_acc=1.0))
    write_run("third", result, args=dict(admm_lr=0.7), attack=other)
    same, loss = "low rank, 4x, ADMM", "+".join(result["attack"]["losses"])
    rate = f"momentum={args['momentum']:g}"
    assert labels("run0", "other", "third") == {
        f"{same}, loss={loss}, {rate}, width=1", f"{same}, loss={loss}, momentum=0.5, width=2",
        f"{same}, loss=margin, {rate}, width=1", f"dense, {rate}, width=1", "dense, momentum=0.5, width=2"}
    write_run("third", result, args=dict(admm_lr=0.7))
    assert labels("run0", "third") == {"dense", *(f"{same}, admm_lr={lr:g}" for lr in (0.7, args["admm_lr"]))}
    write_run("third", result, args=dict(seed=9), device="NVIDIA H100")              # not two seeds of one
    assert labels("run0", "third") == {"dense", f"{same}, device=cpu", f"{same}, device=NVIDIA H100"}
    write_run("third", result, args=dict(seed=9), images=7)
    assert len([label for label in labels("run0", "third") if label.startswith(same)]) == 2
    write_run("third", result, args=dict(ratio=9.0), dense=dict(clean_acc=1.0))
    assert labels("run0", "third") == {same, "low rank, 9x, ADMM", "dense", "dense, of third"}
    write_run("third", result, args=dict(ratio=9.0, lr=0.3, pretrained="x.pt"), dense=dict(clean_acc=1.0))
    assert labels("run0", "third") == {                          # 0.3 is not the rate that trained x.pt
        f"{same}, lr={args['lr']:g}", "low rank, 9x, ADMM, lr=0.3", "dense", "dense, of third"}
    write_run("third", result, args=dict(ratio=9.0, lr=0.3, mode="ticket"), dense=dict(clean_acc=1.0))
    assert "dense, of third" in labels("run0", "third")          # nor here: a ticket's is a copy
    lwm = result | dict(script="hydra_prune", args=hydra | dict(scores="lwm"))
    for run, seed in ((result, 0), (result, 1), (lwm, 1), (lwm, 2)):                 # of three networks
        write_run(f"seed{seed}-{run['script']}", run, args=dict(seed=seed), dense=dict(clean_acc=50.0 + seed))
    (_, dense), = [row for row in compare.main(["seed*"]) if row[0] == "dense"]
    assert [run["clean_acc"] for run in sorted(dense, key=lambda run: run["clean_acc"])] == [50, 51, 52]


def test_compare_refresh_changes_nothing_here_and_repairs_a_table(tmp_path, capsys, monkeypatch):
    """All results are one table, in which no run stands twice; the picture is of all runs on CIFAR-10."""
    def refreshed(copies):
        for name, text in copies.items():
            Path(name).write_text(text)
        compare.main(["--refresh", *copies])
        assert all(Path(name).read_text() == text for name, text in whole.items())
        return capsys.readouterr().out
    monkeypatch.chdir(HERE)
    folders = sorted(str(path.parent) for path in Path("results").glob("*/result.json"))
    table = compare.main(folders)
    assert sorted(run["folder"] for _, runs in table for run in runs if "folder" in run) == folders
    assert len({label for label, _ in table}) == len(table) and not capsys.readouterr().err
    whole = {name.replace("/", "-"): Path(name).read_text() for name in ("README.md", "results/README.md")}
    monkeypatch.chdir(tmp_path)                                  # folders are as seen from the repository's
    assert refreshed(whole).count("no tables changed") == 2
    torn = {}
    for name, text in whole.items():
        rows = re.findall(r"\| (?:1 bit|4 bits) \|[^\n]*\n", text)
        text = text.replace(rows[0], rows[0].replace("1", "7", 3)).replace(rows[-1], "")
        torn[name] = re.sub(r"\n<details>.*?</details>\n", "", text, count=1, flags=re.S)
    assert re.findall("[0-9]+ table", refreshed(torn))
    missing = re.sub(r"```\n\n(\|[^\n]*\n)+\n\* ", "```\n\n* ", whole["README.md"])
    assert missing != whole["README.md"] and "1 table changed" in refreshed({"README.md": missing})
    pytest.importorskip("matplotlib")
    from PIL import Image
    monkeypatch.chdir(HERE)
    command, folders = "compare.py results/cifar10-*", sorted(map(str, Path().glob("results/cifar10-*")))
    rows = compare.main([*folders, "--plot", str(tmp_path / "picture.png")])
    drawn = Image.open(tmp_path / "picture.png").text["Title"]
    assert drawn == Image.open("results/table.png").text["Title"], f"run: {command} --plot results/table.png"
    assert len(drawn.split("; ")) == len(rows) and "4 bits: " in drawn and "dense: " in drawn


def test_bench_times_every_step_and_the_naive_one_learns_the_same(capsys, digits):
    command = "--arch lenet --width 4 --batch-size 8 --num-steps 1 --rounds 2 --amp off --device cpu"
    result, names = bench.main(command.split()), {script.__name__ for script in SCRIPTS}
    assert json.loads(capsys.readouterr().out) == result
    steps, hardware, sizes = result["steps"], result["hardware"], result["inference"]["params_ratio"]
    assert set(steps) == {"naive", "default", "hydra_prune without", "binary_relax without"} | names
    network = common.build_network("lenet", 4, 3, 10, (32, 32)).eval()
    forward = 2e-9 * 8 * common.count_macs(network, dict(channels=3, size=(32, 32)))
    assert hardware["gflop_a_step"] == pytest.approx(dict(naive=6 * forward, default=5 * forward), rel=1e-3)
    assert hardware["times_naive_at_these_rates"] == 1.2
    assert 50 < sum(hardware["profile_per_cent"].values()) < 100.5
    assert set(sizes) == {"dense", "cstar hull", "cstar uniform", "filters"}       # MACs / 16: not by ranks 1
    assert sizes["dense"] == 1 and sizes["filters"] > 8 and 15.9 < sizes["cstar hull"] < 16.6
    macs, narrow = result["inference"]["macs_ratio"], common.build_network("lenet", 1, 3, 10, (32, 32)).eval()
    fewer = [common.count_macs(model, dict(channels=3, size=(32, 32))) for model in (network, narrow)]
    assert macs["filters"] == round(fewer[0] / fewer[1], 1) and macs["cstar hull"] != macs["cstar uniform"]
    assert set(result["inference"]["batch_1_ms"]) == {*sizes, *(f"{name}, folded" for name in sizes)}
    chain = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))       # the ReLU's output serves twice
    assert bench.saved_for_backward(chain, torch.rand(7, 3)) == 4 * 7 * (3 + 5)
    batch, args = next(digits.batches(16, torch.Generator())), digits_args(cstar, "--num-steps 3")
    model = common.build_network("lenet", 1, 1, 10, (8, 8))
    twin = copy.deepcopy(model)
    naive, more = (sgd(m.parameters(), 0.01, momentum=0.9, nesterov=True) for m in (twin, model))
    torch.manual_seed(5)
    cstar.train_epoch(model, [batch], *more, args)
    torch.manual_seed(5)
    bench.naive_step(twin, naive[0], *batch, args.epsilon, args.step_size, args.num_steps)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), twin.parameters()))


def test_bench_ratios_are_those_of_its_times(monkeypatch):
    """By a clock that says so: 8 steps, a warm-up and three rounds, of which one was disturbed, then updates
    and products of matrices."""
    round_ = [8.0, 4.0, 5.0, 4.4, 3.0, 6.0, 2.0, 4.0]
    spent = itertools.chain([9.0] * 8, round_, [99 * t for t in round_], round_, [500.0] * 6,
                            itertools.repeat(0.5))
    monkeypatch.setattr(bench, "seconds_of", lambda function, device: next(spent))
    monkeypatch.setattr(bench, "bench_inference", lambda *_: {})
    flags = "--arch lenet --width 4 --batch-size 8 --rounds 3 --num-steps 1 --amp off --device cpu".split()
    found = bench.main(flags)
    assert [step["seconds"] for step in found["steps"].values()] == round_
    rates = [step["images_per_second"] for step in found["steps"].values()]
    assert rates == [round(8 / t, 1) for t in round_]
    assert found["hardware"]["matrix_gflop_per_second"] == dict(float32=round(2e-9 * 2048**3 / 0.5))
    assert [step["times_naive"] for step in found["steps"].values()] == [1, 2, 1.6, 1.82, 2.67, 1.33, 4, 2]
    assert {name: added["a step"] for name, added in found["added_per_cent"].items()} == dict(
        cstar=25.0, admm_prune=10.0, hydra_prune=100.0, binary_relax=100.0)
    update = dict(update_seconds=500.0, **{"an update each 50,000 images": 2.0})     # of 6250 steps of 4 s
    assert found["added_per_cent"]["cstar"] == {"a step": 25.0} | update
    given, steps = [], []
    for script in SCRIPTS:
        monkeypatch.setattr(script, "train_epoch", lambda *positional, **more: (
            given.append(set(more)), steps.append(positional[-1].num_steps)))
    for step in [*bench.bench_steps(bench.get_args(flags), "cpu")[0].values()][1:]:
        step()
    assert given == [set(), {"penalty"}, {"penalty"}, set(), {"scores"}, set(), {"weights", "lam"}]
    assert set(steps) == {1} and found["threads"] == 1
    monkeypatch.setattr(nn.Module, "compile", compiled := Mock())
    assert "compiled" in bench.bench_steps(bench.get_args([*flags, "--compile"]), "cpu")[0]
    assert compiled.call_count == 1


def test_bench_times_saved_networks_and_onnx_runtime_computes_what_they_are(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    network = dict(arch="lenet", width=1, channels=1, classes=10, size=[16, 16])
    file, twin = tmp_path / "1.pt", tmp_path / "2.pt"
    model = common.build_network(**network).eval()
    for path in (file, twin):
        common.save_model(path, "cstar", "dense", network, model, digits_args(cstar))
    found = bench.main(["--models", str(file), str(twin), "--device", "cpu"])["inference"]
    assert set(found["batch_1"]) == set(found["batch_128"]) == {"plain", "folded", "exported", "onnxruntime"}
    for ms, (ratio,) in (form.values() for form in found["batch_128"].values()):
        assert ratio == round(ms[str(file)] / ms[str(twin)], 2)
    assert torch.allclose(bench.by_onnx(model, x := torch.rand(3, 1, 16, 16))(x), model(x), atol=1e-5)
    ends(2, "takes other images than", bench.main, "--models", file, SHIPPED / "model.pt")
    ends(2, "named twice", bench.main, "--models", file, file)
    normed = common.build_network(**network, mean=[0.4], std=[0.2]).eval()
    assert torch.allclose(bench.folded(normed)(x), normed(x), atol=1e-5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    noisy = ["--models", str(HERE / "results/digits-relax-s0/model.pt"), "--device", "cpu"]
    assert set(bench.main(noisy)["inference"]["batch_1"]) == {"plain", "exported"}   # noise is not folded


@every_script
def test_every_label_of_a_docstring_stands_in_the_code_and_each_script_ships_a_network(script):
    text = Path(script.__file__).read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    labels, code = set(re.findall(r"\[[A-Z]\]", docstring)), text.replace(docstring, "", 1)
    assert len(labels) >= 4 and labels == set(re.findall(r"\[[A-Z]\]", code))
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        script.get_args(["--help"])
    assert docstring.splitlines()[0] in shown.getvalue() and "--dataset" in shown.getvalue()
    shipped = [path.with_name("result.json") for path in (HERE / "results").glob("*/model.pt")]
    assert script.__name__ in [json.loads(path.read_text())["script"] for path in shipped]


def test_readme_is_short_its_commands_parse_and_its_snippet_classifies_an_image(capsys, monkeypatch, digits):
    """It begins with what CI runs; its tables, and those of the results, have at most 8 columns."""
    monkeypatch.chdir(HERE)
    for name in ("README.md", "results/README.md"):
        text = Path(name).read_text()
        blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
        lines = [re.split(" #| > ", line)[0] for block in blocks for line in block.splitlines()]
        commands = [part for line in lines for part in line.split("&&") if part.strip().startswith("python ")]
        assert len(commands) >= 4 and "common.py " not in text
        for _, script, *argv in map(shlex.split, commands):
            if script != "-m":
                module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
                args = module.get_args([*argv, *["--device", "cpu"] * (module is not compare)])
                assert not getattr(args, "model", "").startswith("results/") or Path(args.model).is_file()
        assert max(line.count("|") - line.count("\\|") for line in text.splitlines() if line[:1] == "|") <= 9
    text = Path("README.md").read_text()
    shown = dict(re.findall("([a-z_]+):([^ \n]+)", re.search("    phase:final .*?\n\n", text, re.S)[0]))
    ended = json.loads(Path("results/digits-cstar-s0/log.jsonl").read_text().splitlines()[-1])
    assert shown == {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in ended.items()}
    install, run, check, judge = re.search(r"```sh\n(.*?)```", text, re.S)[1].splitlines()
    assert install == "pip install -r requirements.txt" and run == "python cstar.py --dataset digits"
    assert check.startswith("python -m pytest ") and judge.startswith("python tools/evaluate.py results/")
    assert len(text.splitlines()) <= 200
    snippet, = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == str(digits.test[1][0].item())


def test_results_hold_the_log_that_ends_in_their_result_and_shipped_files_are_what_it_says(digits):
    for folder in sorted(path.parent for path in (HERE / "results").glob("*/result.json")):
        result = json.loads((folder / "result.json").read_text())
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        same = ("clean_acc", "robust_acc", "bytes", "images")
        assert last["phase"] == "final" and [last[k] for k in same] == [result[k] for k in same], folder
        if (folder / "model.pt").is_file():                      # a shipped one
            model = common.load_model(folder / "model.pt")
            assert (folder / "model.pt").stat().st_size == result["bytes"]
            assert sum(p.numel() for p in model.parameters()) == result["parameters"]
            if result["args"]["dataset"] == "digits":            # noise and other machines: 1 % of 360
                found = common.evaluate(model, digits.test, **SETTINGS | dict(num_steps=5), restarts=1, eot=1)
                assert found["clean_acc"] == pytest.approx(result["clean_acc"], abs=1)
                assert found["robust_acc"] > 50


# ---------------------------------------------------------------- several processes
def begin(rank, count, port, found, work, *args):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                       TORCHELASTIC_USE_AGENT_STORE="True")
    common.join()
    found.put((rank, work(*args)))


def together(count, work, *args):
    """What work(*args) gives in each of several processes, forked from one that only imported this file."""
    if "forkserver" not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    args = count, store.port, (found := context.SimpleQueue()), work, *args
    torch.multiprocessing.start_processes(begin, args, count, start_method="forkserver")
    return [value for _, value in sorted(found.get() for _ in iter(found.empty, True))]


class Halves(nn.Module):
    """A batch norm that takes every other image apart, with statistics of its own."""
    def __init__(self, norm):
        super().__init__()
        self.norms = nn.ModuleList([norm, copy.deepcopy(norm)])
        self.norms[1].weight, self.norms[1].bias = norm.weight, norm.bias

    def forward(self, x):
        return torch.stack([norm(x[i::2]) for i, norm in enumerate(self.norms)], 1).flatten(0, 1)


def train(name, folder, norm):
    """torch's seed in each epoch of a run and after it, in float64, without random starts, of LeNet; with
    `norm`, of ResNet-18. Rank 0 draws from the run's generator whenever it alone computes."""
    def training(*args, **more):
        seeds.append(torch.initial_seed())
        return train_epoch(*args, **more)
    def drawing(run, name, compute):
        return once(run, name, lambda: (torch.rand(3, generator=run.generator), compute())[1])
    def build(*arch, **network):
        model = common.build_network(*arch, **network).double()
        for name, m in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]:
            model.set_submodule(name, norm(m))
        return model
    script, seeds, once = importlib.import_module(name), [], common.Run.compute_once
    train_epoch, script.train_epoch, common.Run.compute_once = script.train_epoch, training, drawing
    script.pgd = functools.partial(common.pgd, random_start=False)
    unevaluated(pytest.MonkeyPatch())
    script.build_network, common.to_float = build, lambda images: images.double() / 255
    size = "--ratio 1.2" if script is not binary_relax else "--bits 2 --finetune-epochs 0"  # rounding decides
    flags = TINY.replace("admm", PHASE[script]).replace("--ratio 4", size)
    more = "--pretrain-epochs 1" if norm else "--arch lenet --width 4"
    script.main(argv_of(flags, more, "--amp off --output", folder))
    return [*seeds, torch.initial_seed()]


@pytest.mark.parametrize("script, halves", [*zip(SCRIPTS, [None] * 4), (cstar, Halves)])
def test_two_processes_train_the_weights_of_one(tmp_path, script, halves):
    """Batch norms have the statistics of their shares; what is saved is the mean. Noise is each's own."""
    one, two = tmp_path / "one", tmp_path / "two"
    together(1, train, script.__name__, one, halves)
    seeds = sum(together(2, train, script.__name__, two, halves and copy.copy), [])
    assert len({*seeds}) == len(seeds) > 8
    for a, b in list(zip(log_of(one), log_of(two)))[1:2 if halves else 3]:
        assert all(b[key] == pytest.approx(a[key]) for key in a.keys() - {"seconds"})
    one, two = (common.read_artifact(folder / "dense.pt")["state"] if halves else
                common.read_file(folder / "last.pt")["states"]["model"] for folder in (one, two))
    for name, t in two.items():
        parts = [v for k, v in one.items() if re.sub(r"norms\.\d\.", "", k) == name]
        assert (t - sum(parts) / len(parts)).abs().max() < 1e-10


def judge():
    attacked, pgd, attack = [], common.pgd, dict(epsilon=0.2, step_size=0.1, num_steps=3, restarts=2)
    common.pgd = lambda model, x, *args, **more: attacked.append(len(x)) or pgd(model, x, *args, **more)
    images, model = common.load_data(digits_args(cstar)).test, common.load_model(SHIPPED / "model.pt")
    noisy = Wrapped(model, lambda model, x: model(x + 0.01 * torch.randn_like(x)))
    torch.manual_seed(0)
    chain, few = common.build_network("cnn_small", 2, 1, 10, (8, 8)), [t[:60] for t in images]
    found, count = common.evaluate(model, images, **attack), sum(attacked)
    verified = hydra_prune.verify(chain, few, 0.01, torch.ones(60) == 1)
    return count, (found, verified, common.evaluate(noisy, few, **attack))


def test_two_processes_find_the_accuracies_of_one_and_attack_no_image_twice():
    (attacked, one), (first, two), (second, again) = together(1, judge) + together(2, judge)
    assert attacked == first + second > first > 0 and one == two == again
    assert 0 < one[0]["robust_acc"] < one[0]["clean_acc"] and 0 < one[1]["verified_acc"] < 100


def exact(kind, value):
    """Flags before, while networks are evaluated and timed in exact_float32, and after, once one was set."""
    backends, seen = torch.backends, []
    cudnn, onednn = backends.cudnn, backends.mkldnn
    products = cudnn.conv, backends.cuda.matmul, onednn.conv, onednn.matmul
    def flags():
        return *(product.fp32_precision for product in products), cudnn.benchmark, cudnn.deterministic
    if kind == "old":
        torch.set_float32_matmul_precision(value)
    else:
        setattr(dict(all=backends, cudnn=cudnn, convolutions=cudnn.conv, products=products[1])[kind],
                "fp32_precision", value)
    before, images = flags(), [t[:1] for t in common.load_data(digits_args(cstar)).test]
    model = Wrapped(resnet().eval(), lambda f, x: (seen.append(flags()), f(x))[1]).eval()
    common.evaluate(model, images, **SETTINGS | dict(num_steps=1))
    evaluated = set(seen)
    seen.clear()
    common.latency([model], dict(channels=1, size=(8, 8)), 1, "cpu")
    timed = set(seen)
    with common.exact_float32():
        assert torch.get_float32_matmul_precision() == "highest" and not cudnn.allow_tf32
        torch.export.export(resnet().eval(), (common.to_float(images[0]),))          # reads the old flags
    return before, evaluated, timed, flags()


@pytest.mark.parametrize("kind, value", [
    ("old", "medium"), ("convolutions", "ieee"),
    *((kind, "tf32") for kind in ("all", "cudnn", "convolutions", "products"))])
def test_evaluation_is_in_exact_float32_whatever_the_program_has_set(kind, value):
    """By torch's old flags or new ones, after which reading the old can raise; in a process of its own."""
    (before, evaluated, timed, after), = together(1, exact, kind, value)
    assert evaluated == {("ieee",) * 4 + (False, True)} and timed == {("ieee",) * 4 + (True, False)}
    assert before == after


def stop_and_resume(folder):
    tiny(folder / "whole")
    stopped(4, lambda: tiny(folder / "run"))
    if common.rank() == 0:
        shutil.copytree(folder / "run", folder / "one")
    stopped(2, lambda: tiny(folder / "run", "--resume"))             # before the cut and what it draws
    return tiny(folder / "run", "--resume", evaluate=True)["processes"]


def test_two_processes_resume_bit_for_bit_and_one_goes_on_where_they_stopped(tmp_path):
    assert together(2, stop_and_resume, tmp_path) == [2, 2]
    assert (tmp_path / "whole/model.pt").read_bytes() == (tmp_path / "run/model.pt").read_bytes()
    assert json.loads((tmp_path / "run/result.json").read_text())["processes"] == 2
    tiny(tmp_path / "one", "--resume")
    whole, run, one = (log_of(tmp_path / name) for name in ("whole", "run", "one"))
    assert (len(whole), len(run), len(one)) == (8, 9, 9) and run[:3] == one[:3]
    assert one[3]["processes"] == 1 and "note" in one[3]         # what result.json has is not of all epochs


def refuse(folder):
    sys.argv, sys.stderr = ["cstar.py"], open(folder / "errors", "a", buffering=1)
    common.cli(lambda: tiny(folder / "run", "--batch-size 31"))


def leave():
    if common.rank():
        os._exit(0)
    fails(1, "out of reach", common.sync, torch.distributed.barrier)


def test_two_processes_say_what_ended_them_once(tmp_path):
    together(2, leave)
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as stop:
        together(2, refuse, tmp_path)
    assert stop.value.exit_code == 2 and os.listdir(tmp_path) == ["errors"]
    errors, script = (tmp_path / "errors").read_text(), tmp_path / "cstar.py"
    assert re.fullmatch("cstar.py: argument --batch-size: 31 is not 2 .*\n", errors)
    for end in ("os.kill(os.getpid(), 9)", "1 / 0"):             # and a tidy end would never come
        script.write_text(f"import atexit, os, sys, time; sys.path[0] = {str(HERE)!r}; import common, cstar\n"
            f"if os.environ['RANK'] == '1': cstar.train_epoch = lambda *_, **more: {end}\n"
            "atexit.register(time.sleep, 999)\ncommon.cli(cstar.main)")
        run = spawn(*argv_of("-m torch.distributed.run --standalone --nproc_per_node=2", script, TINY,
                             "--pretrain-epochs 500 --output", tmp_path / end[0]))
        errors = run.communicate(timeout=90)[1]
        said, = re.findall("^cstar.py: (.*)", errors, re.M)
        assert re.match("pretrain 1/500: another pro|stopped; .*torchrun --nproc.*--resume", said)
        assert run.returncode == 1 and errors.count("\nZeroDivisionError: ") == (end == "1 / 0")


# ---------------------------------------------------------------- photos, and networks that others trained
def test_photos_are_cut_by_seed_epoch_and_index_whatever_the_workers_and_the_batches(zoo, monkeypatch):
    def load(seed, *batches):
        return torch.cat([*data.train[0].load(map(torch.tensor, batches), "cpu", seed)])
    from PIL import Image
    from torchvision.transforms import v2
    data, other = (common.load_data(cstar.get_args(argv_of(TINY, *zoo, "--workers", n))) for n in "13")
    generators, seen = (torch.Generator(), torch.Generator()), set()
    for count in (12, 24):
        epoch, again = (torch.cat([x for x, _ in one.batches(4, generator)])
                        for one, generator in zip((data, other), generators))
        assert torch.equal(epoch, again) and epoch.shape == (12, 3, 32, 32)
        seen |= {tuple(pixels) for pixels in epoch.flatten(1).tolist()}
        assert len(seen) == count
    images = load(1, [3, 7, 0], [5])
    assert torch.equal(images[[3, 2, 1]], load(1, [5, 0], [7]))
    assert not (images[[3, 2]] == load(2, [5, 0])).flatten(1).all(1).any()
    files = [f"{zoo[1]}/zoo/val/{name}/{i}.jpg" for i in range(6) for name in ("ant", "bee")]
    same, = common.Photos(files[:1] * 12, 1).load([torch.arange(12)], "cpu", 1)
    assert len(same.flatten(1).unique(dim=0)) == 12              # each is cut anew
    with monkeypatch.context() as patch:
        patch.setattr(v2, "RandomResizedCrop", v2.CenterCrop)
        same, = common.Photos(files[:1] * 12, 1).load([torch.arange(12)], "cpu", 1)
    mirrored = (same == same[0].flip(2)).flatten(1).all(1)       # half of them
    assert 0 < mirrored.sum() < 12 and torch.equal(~mirrored, (same == same[0]).flatten(1).all(1))
    with monkeypatch.context() as patch:                         # decoded in parts, each in its place
        patch.setattr(common.Photos, "load", lambda self, parts, device: (
            part.byte().view(-1, 1, 1, 1).expand(-1, 3, 32, 32) for part in parts))
        patch.setattr(common, "subset", lambda x, y, *_: (common.Photos(files[:1] * 120, 1), y))
        images = common.load_data(cstar.get_args(argv_of(TINY, *zoo))).test[0]
        assert images[:, 0, 0, 0].tolist() == [*range(120)]
    middle = v2.Compose([v2.Resize(36), v2.CenterCrop(32)])
    photos = [v2.functional.pil_to_tensor(Image.open(file).convert("RGB")) for file in files]
    assert torch.equal(data.test[0], torch.stack([*map(middle, photos)]))
    x, y = next(data.batches(12, torch.Generator()))
    assert data.test[1].tolist() == [0, 1] * 6 and ((x.mean((1, 2, 3)) > 0.5) == y.bool()).all()


@pytest.mark.parametrize("split, spoil", [
    ("val", lambda data: b""), ("train", lambda data: data[:len(data) // 2]), ("train", lambda data: b""),
    ("train", lambda data: b"BM" + data)])
def test_photo_that_is_none_is_one_sentence_with_its_path(zoo, tmp_path, split, spoil):
    shutil.copytree(f"{zoo[1]}/zoo", tmp_path / "zoo")
    path = tmp_path / "zoo" / split / "bee/1.jpg"
    path.write_bytes(spoil(path.read_bytes()))
    more = ["--data-dir", tmp_path, "--output", tmp_path / "run"]
    ends(1, re.escape(str(path)) + r" cannot be read.*\([^/]*\)$", cstar.main, TINY, *zoo, *more)


def test_torchvision_network_comes_to_its_result_within_cstars_budget(zoo, tmp_path):
    flags = "--arch imagenet_resnet18 --width 16 --ratio 16 --admm-epochs 0 --finetune-epochs 1"
    result = tiny(tmp_path / "run", *zoo, flags, evaluate=True)
    assert result["images"] == 12 and 16 <= result["params_ratio"] < 16.1 and result["bytes_ratio"] > 15


@pytest.mark.parametrize("arch", ["imagenet_resnet18", "imagenet_resnet50"])
def test_torchvision_networks_are_their_own_and_lose_filters_exactly(arch):
    from torchvision import models
    model = shaken(arch, 16, 3, 64, torch.float32).eval()
    own = getattr(models, arch.removeprefix("imagenet_"))(num_classes=10).eval()
    given = common.build_network(arch, 16, 3, 10, (64, 64), [0.4] * 3, [0.25] * 3)
    assert [*given.mean.flatten(), *given.std.flatten()] == pytest.approx([0.4] * 3 + [0.25] * 3)
    own.load_state_dict(model.state_dict())
    x, mean, std = torch.rand(2, 3, 64, 64), *torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    assert torch.equal(model(x), own((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
    shortcuts = {f"layer{i}.0.downsample.0.weight" for i in range(1 + (arch == "imagenet_resnet18"), 5)}
    weights = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert weights - binary_relax.quantisable(model).keys() == shortcuts | {"fc.weight"}
    groups = common.removable_groups(model, dict(channels=3, size=[64, 64]))         # else a Fault
    convolutions = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for writers, _, _ in groups for name in writers} == convolutions


def prefixed(state, *prefixes):
    return {prefix + name: t for name, t in state.items() for prefix in prefixes}


PUBLISHED = [dict, lambda state: dict(state_dict=state, epoch=9, best=torch.tensor(1.0), format="pytorch"),
             lambda state: dict(net=prefixed(state, "module._orig_mod."), acc=95.0),
             lambda state: dict(model=prefixed({k: t.half() for k, t in state.items()}, "model.")),
             lambda state: dict(model_state_dict={k: t for k, t in state.items() if "num_batches" not in k}),
             lambda state: dict(model=prefixed(state, "module.attacker.model.", "module.model.") | {
                 "module.normalizer.new_mean": torch.zeros(1)})]


@pytest.mark.parametrize("form, renamed", [*zip(PUBLISHED, itertools.cycle((True, False)))])
def test_pretrained_takes_what_others_published(tmp_path, digits, form, renamed):
    own, images = shaken("resnet18", 1, 1, 8).half().float().eval(), common.to_float(digits.test[0][:40])
    theirs = own.state_dict()
    if renamed:                                                  # as torchvision has them
        theirs = {k.replace("shortcut", "downsample").replace("linear", "fc"): t for k, t in theirs.items()}
    torch.save(form(theirs), path := tmp_path / "theirs.pt", _use_new_zipfile_serialization=form is not dict)
    tiny(tmp_path / "run", UNTRAINED, "--mean 0.3 --std 0.5 --pretrained", path)
    with torch.no_grad():                                        # others normalise outside of the network
        assert torch.equal(common.load_model(tmp_path / "run/dense.pt")(images), own((images - 0.3) / 0.5))
    artifact, compact = common.read_model(tmp_path / "run/model.pt")
    assert (artifact["network"]["mean"], artifact["network"]["std"]) == ([0.3], [0.5])
    assert sum(p.numel() for p in compact.parameters()) <= sum(p.numel() for p in own.parameters()) / 4


@pytest.mark.parametrize("words, change", [
    (r"its linear.weight is \(9, 32\), wanted: \(10, 32\)", {"linear.weight": torch.zeros(9, 32)}),
    ("its mu has no place", {"mu": torch.zeros(1)}),
    ("bn1.bias is missing .but bn1.running_mean is there", {"bn1.bias": None}),
    (r"conv1.weight is missing .but nothing is there., wanted: \(4", {"state_dict": {}}),
    ("could run code", {"hostile": Hostile()}),
    pytest.param("linear.weight is no dense tensor", {"linear.weight": torch.ones(10, 32).to_sparse()},
                 marks=pytest.mark.filterwarnings("ignore:Validating sparse")),
    ("bn1.bias is not finite", {"bn1.bias": torch.full((4,), math.nan)})])
def test_pretrained_that_does_not_fit_is_one_sentence_and_runs_no_code(tmp_path, monkeypatch, words, change):
    monkeypatch.chdir(tmp_path)
    torch.save(resnet().state_dict() | change, "theirs.pt")
    argv = cstar.main, TINY, UNTRAINED, "--pretrained theirs.pt --output run"
    ends(1 if "code" in words else 2, words, *argv)
    assert os.listdir() == ["theirs.pt"]
    content = Path("theirs.pt").read_bytes()                     # a byte of a weight
    Path("theirs.pt").write_bytes(content.replace(weight := resnet().conv1.weight.detach().numpy().tobytes(),
                                                  weight[:-1] + b"x"))
    ends(1, "theirs.pt is damaged", *argv)


def narrow_gradients():
    """The largest relative error of the weight gradients of strided 1x1 layers by six threads."""
    torch.set_num_threads(6)
    errors = []
    for channels in (3, 8, 12):
        layer = common.prepare(nn.Conv2d(channels, 5, 1, 2, bias=False), Mock(device="cpu", compile=False))
        x, g = torch.rand(50, channels, 32, 32), torch.rand(50, 5, 16, 16)
        layer(x.contiguous(memory_format=torch.channels_last)).backward(g)
        right = torch.einsum("nohw,nihw->oi", g, x[:, :, ::2, ::2])
        errors.append(float((layer.weight.grad[:, :, 0, 0] - right).norm() / right.norm()))
    return max(errors)


def test_narrow_strided_layers_learn_with_any_number_of_threads():
    error, = together(1, narrow_gradients)                           # a process of its own: oneDNN crashes
    assert error < 1e-5


def test_photos_want_their_own_networks_and_a_constant_step_its_own_flags(digits):
    photos, small = (common.Data((torch.zeros(2, 3, n, n), None), None, ["ant", "bee"]) for n in (224, 32))
    args = Mock(arch="resnet18", width=1, mean=None, std=None)
    assert common.network_of(args, small)["size"] == [32, 32]
    fails(2, "photos want imagenet_resnet18", common.network_of, args, photos)
    args.arch = "imagenet_resnet18"
    assert common.network_of(args, photos)["size"] == [224, 224]
    model, attack = common.load_model(SHIPPED / "model.pt"), dict(epsilon=0.2, step_size=0.03, num_steps=10)
    constant, annealed = (common.sanity_flags(model, digits.test, anneal=on, **attack) for on in (0, 1))
    assert "noise" in "".join(annealed) and "noise" not in "".join(constant)
    constant, annealed = (judges.transfer(model, model, digits.test, anneal=on, **attack) for on in (0, 1))
    assert constant < annealed - 1


def test_normalisation_is_in_the_bounds_and_photos_are_evaluated_a_few_at_a_time():
    model, x, y = chain(0, "cnn_small")
    common.normalised(model, [0.3, 0.6], [0.5, 0.2]).double()
    assert all(torch.allclose(bound, margins(model, x, y)) for bound in all_bounds(model, x, y, 0.0).values())
    for arch, more in (("enresnet", dict(depth=8, members=1, noise=0.0)), ("resnet18", {})):
        plain, normed = (binary_relax.make_network(
            arch, (8, 8), width=1, channels=1, classes=10, **more, **values).eval()
            for values in ({}, dict(mean=[0.3], std=[0.5])))
        normed.load_state_dict(plain.state_dict())
        x = torch.rand(3, 1, 8, 8)
        assert torch.allclose(normed(x), plain((x - 0.3) / 0.5), atol=1e-5)
    model, sizes = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 3)), []
    images = torch.randint(0, 256, (30, 3, 224, 224), dtype=torch.uint8), torch.arange(30) % 3
    model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    for judge in (common.evaluate, common.sanity_flags):
        judge(model, images, **SETTINGS | dict(num_steps=1))
    assert sizes.count(30) == 4 and max(sizes) == 30             # to see whether the output is random
    small = torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.zeros(300)
    assert [[len(x) for x, _ in common.batched(*some)] for some in (images, small)] == [[27, 3], [250, 50]]
