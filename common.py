"""What the four papers share: data, networks, PGD, evaluation, checkpoints, logs and compact files.

Nothing in this file belongs to one paper. A network takes images in [0, 1], (N, C, H, W), and gives logits.

    python common.py evaluate runs/DIR/model.pt       judge any saved network: PGD, margin loss, transfer, AutoAttack
    python common.py compare runs/*                   one Markdown table over finished runs of all scripts
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# What each data set is trained with unless a flag says otherwise. Epochs are ours: digits fits two minutes of
# two CPU cores, the 32x32 sets ten minutes of one large GPU. `compress_epochs` are those of the paper's own phase.
CIFAR = dict(arch="resnet18", width=16, pretrain_epochs=30, compress_epochs=15, finetune_epochs=15, batch_size=256,
             lr=0.2, epsilon=8 / 255, step_size=2 / 255, num_steps=10, crop=4, flip=True)
RECIPES = {
    "digits": CIFAR | dict(width=4, pretrain_epochs=14, compress_epochs=8, finetune_epochs=8, batch_size=64, lr=0.1,
                           epsilon=0.2, step_size=0.05, crop=1, flip=False),
    "mnist": CIFAR | dict(arch="lenet", width=4, batch_size=128, lr=0.05, epsilon=0.3, step_size=0.01, num_steps=40,
                          crop=0, flip=False),
    "cifar10": CIFAR, "cifar100": CIFAR, "svhn": CIFAR | dict(flip=False, lr=0.1), "a folder": CIFAR,
}


# ---------------------------------------------------------------- faults and flags

class Fault(RuntimeError):
    """A run-time fault: one sentence for the user, exit status 1."""
    status = 1


class UsageFault(Fault):
    """A wrong flag or a contradiction between flags: one line, exit status 2, nothing written."""
    status = 2


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line."""

    def __init__(self, doc):
        super().__init__(description=doc.strip().splitlines()[0], allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(low, high, kind=float, hint=""):
    """An argparse type: a `kind` (float, also as 8/255, or int) in [low, high]."""
    def convert(text):
        try:
            value = float(Fraction(text)) if kind is float else int(text)
        except (ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not low <= value <= high:
            what = "a number" if kind is float else "a whole number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} from {low} to {high}{hint}")
        return value
    return convert


def whole(low, high=10**9):
    return number(low, high, int)


radius = number(0, 1, hint=" (pixels are in [0, 1]: write 8/255, not 8)")


def resolve(parser, argv, script, compress):
    """Parses the flags, fills what was not given from RECIPES, and checks what flags must not contradict.

    `compress` names the flag that holds the epochs of the paper's own phase."""
    args = parser.parse_args(argv)
    known = args.dataset in RECIPES
    if not known and (args.dataset == "a folder" or args.epsilon is None or args.step_size is None):
        parser.error(f"argument --dataset: {args.dataset} is none of {', '.join(list(RECIPES)[:-1])}; a folder of classes "
                     "of your own needs --epsilon and --step-size")
    if args.pretrained and args.pretrain_epochs:
        parser.error("argument --pretrain-epochs: not with --pretrained, which skips that phase")
    if args.pretrained and not Path(args.pretrained).is_file():
        parser.error(f"argument --pretrained: there is no file {args.pretrained}")
    if args.pretrained:
        args.pretrain_epochs = 0
    for name, value in RECIPES[args.dataset if known else "a folder"].items():
        name = compress if name == "compress_epochs" else name
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.device = check_device(args.device)
    if args.eval_images is None:
        args.eval_images = 1000 if args.device == "cpu" else 0
    args.amp = args.amp == "on" or args.amp == "auto" and bfloat16_is_fast(args.device)
    args.output = args.output or f"runs/{script}-{args.dataset}-{args.arch}w{args.width}-r{args.ratio:g}-s{args.seed}"
    return args


def check_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:1' -> the device's name, or a usage fault."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name not in ["cpu"] + ["cuda"] * (count > 0) + [f"cuda:{i}" for i in range(count)]:
        raise UsageFault(f"argument --device: {name} is not on this machine, which has cpu and {count} CUDA devices")
    return name


def bfloat16_is_fast(device):
    """Whether the hardware multiplies bfloat16: measured 2 to 3 times float32's speed where it does."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(args):
    """bfloat16 matrix products in training where --amp says so; evaluation is always float32."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp)


def cli(main):
    """Runs main(); a fault becomes one line and an exit status, a signal stops at once and says how to continue."""
    def terminated(*_):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminated)
    status, message = 0, None
    try:
        main()
    except Fault as fault:
        status, message = fault.status, str(fault)
    except BrokenPipeError:                                  # `| head` closed the pipe: no message, no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except torch.OutOfMemoryError:
        status, message = 1, "out of memory on the device: try a smaller --batch-size or --width"
    except OSError as fault:
        status, message = 1, str(fault)
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = stop.code
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if status in (130, 143) and Run.active:
        command = [a for a in sys.argv if a != "--resume"]
        print(f"stopped; the last finished epoch is kept. Continue with: python {shlex.join(command)} --resume",
              file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- data

TORCHVISION = {"mnist": ("MNIST", "MNIST/raw"), "cifar10": ("CIFAR10", "cifar-10-batches-py"),
               "cifar100": ("CIFAR100", "cifar-100-python"), "svhn": ("SVHN", "train_32x32.mat")}


class Data:
    """A data set on the device: uint8 images (N, C, H, W) and labels (N,), shuffled and augmented there in batches.

    train, test: pairs (images, labels); classes: names; crop: pixels of padding for random crops; flip: or not."""

    def __init__(self, train, test, classes, crop, flip):
        self.train, self.test, self.classes, self.crop, self.flip = train, test, classes, crop, flip

    def steps(self, batch_size):
        """Batches in an epoch. All are full: what a shuffled epoch has left over is left out of that epoch."""
        return max(1, len(self.train[1]) // batch_size)

    def batches(self, batch_size, generator):
        """Yields (x float (B, C, H, W) in [0, 1], y (B,)) of one epoch, in an order drawn from `generator`."""
        images, labels = self.train
        order = torch.randperm(len(labels), generator=generator, device=labels.device)
        for index in order[:self.steps(batch_size) * batch_size].split(batch_size):
            yield to_float(augment(images[index], self.crop, self.flip, generator)), labels[index]


def to_float(images):
    """uint8 -> float in [0, 1], channels last in memory: the convolutions' fast layout."""
    return images.float().div(255).contiguous(memory_format=torch.channels_last)


def augment(x, crop, flip, generator):
    """Random crop after zero padding by `crop` pixels and random horizontal flip of x (B, C, H, W), as one gather."""
    if not crop and not flip:
        return x
    b, c, h, w = x.shape
    dy, dx = torch.randint(0, 2 * crop + 1, (2, b, 1), generator=generator, device=x.device)
    rows, cols = dy + torch.arange(h, device=x.device), dx + torch.arange(w, device=x.device)   # (B, H), (B, W)
    if flip:
        mirrored = torch.rand(b, 1, generator=generator, device=x.device) < 0.5
        cols = torch.where(mirrored, cols.flip(1), cols)
    b, c = torch.arange(b, device=x.device), torch.arange(c, device=x.device)
    return F.pad(x, (crop,) * 4)[b[:, None, None, None], c[:, None, None], rows[:, None, :, None], cols[:, None, None]]


def balanced(labels, count):
    """Indices of `count` images, the first of each class in turn, so that every prefix is balanced too."""
    labels = np.asarray(labels)
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, rank))[:count]


def load_data(args):
    """The data set that the flags name, as Data on args.device. Nothing is substituted silently.

    Looked for under args.data_dir as torchvision lays it out, then as class folders NAME/{train,test}/<class>/*;
    a known set that is absent is downloaded by torchvision. digits lies beside this file."""
    name, root = args.dataset, Path(args.data_dir)
    if name == "digits":
        train, test, classes = read_digits()
    elif name in TORCHVISION and (root / TORCHVISION[name][1]).exists() or not (root / name / "train").is_dir():
        train, test, classes = read_torchvision(name, root)
    else:
        train, test, classes = read_folders(root / name, args.workers)
    pairs = []
    for (images, labels), count, flag in ((train, getattr(args, "train_images", 0), "--train-images"),
                                          (test, args.eval_images, "--eval-images")):
        if count and count != 1000 and not len(classes) <= count <= len(labels):
            raise UsageFault(f"argument {flag}: {count} is not from {len(classes)} to the {len(labels)} images there are")
        chosen = balanced(labels, count or None)
        if not count or count >= len(labels):
            chosen = np.arange(len(labels))
        pairs.append((torch.from_numpy(images[chosen] if len(chosen) < len(labels) else images).to(args.device),
                      torch.from_numpy(labels[chosen].astype(np.int64)).to(args.device)))
    recipe = RECIPES.get(name, CIFAR)
    return Data(*pairs, classes, recipe["crop"], recipe["flip"])


def read_digits():
    """1,797 real 8x8 digits (UCI, as scikit-learn ships them), grey levels 0 to 16; the last 360 are the test set."""
    with np.load(Path(__file__).with_name("data") / "digits.npz") as stored:
        images = np.rint(stored["images"][:, None] * (255 / 16)).astype(np.uint8)
        labels = stored["labels"]
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:]), [str(d) for d in range(10)]


def read_torchvision(name, root):
    """A known set through torchvision, downloaded if it is absent."""
    if name not in TORCHVISION:
        raise UsageFault(f"argument --dataset: there is no folder {root / name / 'train'} with one folder of images a class")
    try:                                # RuntimeError, not ImportError, when torch and torchvision do not match
        import torchvision.datasets
        reader = getattr(torchvision.datasets, TORCHVISION[name][0])
        option = (dict(split="train"), dict(split="test")) if name == "svhn" else (dict(train=True), dict(train=False))
        train, test = (reader(str(root), download=True, **o) for o in option)
    except (ImportError, RuntimeError, OSError) as fault:
        raise Fault(f"{name} is neither under {root / TORCHVISION[name][1]} nor under {root / name}/train/<class>/, and "
                    f"torchvision could not fetch or read it ({str(fault).strip().splitlines()[0]}); put the files there, "
                    "or use --dataset digits, which needs none") from None
    pairs = []
    for split in (train, test):
        images = np.asarray(split.data)
        if name == "mnist":
            images = images[:, None]
        elif name != "svhn":                                             # svhn's are (N, C, H, W) already
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        pairs.append((images, np.asarray(split.labels if name == "svhn" else split.targets)))
    return *pairs, getattr(train, "classes", [str(d) for d in range(10)])


def read_folders(root, workers):
    """Class folders ROOT/{train,test}/<class>/*, any type that Pillow reads; decoded once, then cached as one npz."""
    from PIL import Image
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    if len(classes) < 2:
        raise Fault(f"{root / 'train'} holds {len(classes)} class folders, and two are the least")
    files, stamp = {}, hashlib.sha1()
    for split in ("train", "test"):
        files[split] = []
        for label, name in enumerate(classes):
            folder = root / split / name
            found = sorted((e.name, e.stat()) for e in os.scandir(folder) if e.is_file()) if folder.is_dir() else []
            if not found:
                raise Fault(f"there are no images of class {name} under {folder}")
            files[split] += [(str(folder / f), label) for f, _ in found]
            stamp.update("".join(f"{f} {s.st_size} {s.st_mtime_ns}\n" for f, s in found).encode())
        extra = [e.name for e in os.scandir(root / split) if e.is_dir() and e.name not in classes]
        if extra:
            raise Fault(f"{root / split} holds a class {extra[0]} that {root / 'train'} does not")
    cache = root.with_name(root.name + "-cache.npz")
    if cache.is_file():
        with contextlib.suppress(Exception), np.load(cache) as stored:         # unreadable: decoded again
            if str(stored["stamp"]) == stamp.hexdigest():
                return *((stored[f"{s}_x"], stored[f"{s}_y"]) for s in files), classes
    with Image.open(files["train"][0][0]) as first:
        mode, size = "L" if first.mode in ("L", "1") else "RGB", first.size

    def decode(path):
        try:
            with Image.open(path) as image:
                if image.size != size or image.mode.startswith(("I", "F")) or mode == "L" and image.mode not in ("L", "1"):
                    raise Fault(f"{path} is {image.size} {image.mode}, and the first image is {size} {mode}: all must be "
                                "of one size and kind")
                return np.asarray(image.convert(mode)).reshape(size[1], size[0], -1).transpose(2, 0, 1)
        except OSError as fault:
            raise Fault(f"{path} cannot be read as an image ({fault})") from None

    arrays = {"stamp": np.array(stamp.hexdigest())}
    with ThreadPoolExecutor(workers) as pool:
        for split, listed in files.items():
            images = np.empty((len(listed), 1 if mode == "L" else 3, size[1], size[0]), np.uint8)
            for i, pixels in enumerate(pool.map(decode, [path for path, _ in listed], chunksize=256)):
                images[i] = pixels
            arrays |= {f"{split}_x": images, f"{split}_y": np.array([label for _, label in listed])}
    with contextlib.suppress(OSError):                                         # a folder that is read-only
        temporary = cache.with_name(f"{cache.stem}-{os.getpid()}.tmp.npz")
        np.savez(temporary, **arrays)
        os.replace(temporary, cache)
    return *((arrays[f"{s}_x"], arrays[f"{s}_y"]) for s in files), classes


# ---------------------------------------------------------------- networks

def conv3x3(c_in, c_out, stride=1, bias=False):
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias)


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images, with the layer names of the common CIFAR implementation."""
    smallest = 8

    def __init__(self, width, channels, classes, size):
        super().__init__()
        w = 4 * width
        self.conv1, self.bn1 = conv3x3(channels, w), nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(BasicBlock(w, w, 1), BasicBlock(w, w, 1))
        self.layer2 = nn.Sequential(BasicBlock(w, 2 * w, 2), BasicBlock(2 * w, 2 * w, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * w, 4 * w, 2), BasicBlock(4 * w, 4 * w, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * w, 8 * w, 2), BasicBlock(8 * w, 8 * w, 1))
        self.linear = nn.Linear(8 * w, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class VGG16(nn.Module):
    """VGG-16 with batch norm, convolution biases and one linear layer: the ADMM paper's."""
    smallest = 32

    def __init__(self, width, channels, classes, size):
        super().__init__()
        layers, c_in = [], channels
        for c in (4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M"):
            if c == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [conv3x3(c_in, c * width, bias=True), nn.BatchNorm2d(c * width), nn.ReLU()]
                c_in = c * width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(c_in, classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x):
        h = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(h))))
        return out + (x if self.shortcut is None else self.shortcut(h))


class WRN28_4(nn.Module):
    """Wide ResNet 28-4 (pre-activation, without the unused extra block that some public copies carry)."""
    smallest = 4

    def __init__(self, width, channels, classes, size):
        super().__init__()
        w = 4 * width
        self.conv1 = conv3x3(channels, width)
        self.block1 = nn.Sequential(WideBlock(width, w, 1), *(WideBlock(w, w, 1) for _ in range(3)))
        self.block2 = nn.Sequential(WideBlock(w, 2 * w, 2), *(WideBlock(2 * w, 2 * w, 1) for _ in range(3)))
        self.block3 = nn.Sequential(WideBlock(2 * w, 4 * w, 2), *(WideBlock(4 * w, 4 * w, 1) for _ in range(3)))
        self.bn1, self.fc = nn.BatchNorm2d(4 * w), nn.Linear(4 * w, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class LeNet(nn.Module):
    """The ADMM paper's LeNets: the padded one (MNIST) for one channel, the unpadded one (CIFAR) for others."""
    smallest = 4

    def __init__(self, width, channels, classes, size):
        super().__init__()
        grey = channels == 1
        c1, c2, hidden = (2, 4, (64,)) if grey else (6, 16, (120, 84))
        self.conv1 = nn.Conv2d(channels, c1 * width, 5, padding=2 * grey)
        self.conv2 = nn.Conv2d(c1 * width, c2 * width, 5, padding=2 * grey)
        side = [s // 4 if grey else ((s - 4) // 2 - 4) // 2 for s in size]
        sizes = [c2 * width * side[0] * side[1], *(h * width for h in hidden), classes]
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:]), 1):
            setattr(self, f"fc{i}", nn.Linear(n_in, n_out))
        self.depth = len(hidden)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        for i in range(1, self.depth + 1):
            x = F.relu(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{self.depth + 1}")(x)


NETWORKS = {"resnet18": ResNet18, "vgg16": VGG16, "wrn28_4": WRN28_4, "lenet": LeNet}


def build_network(arch, width, channels, classes, size):
    """A network of NETWORKS for images (channels, *size); width 16 is the standard network. Fault if it is too deep."""
    if arch not in NETWORKS:
        raise Fault(f"there is no network {arch}; there are {', '.join(NETWORKS)}")
    smallest = 16 if arch == "lenet" and channels != 1 else NETWORKS[arch].smallest
    if min(size) < smallest:
        raise UsageFault(f"argument --arch: {arch} is too deep for images of {size[0]}x{size[1]}; it needs {smallest}x{smallest}")
    return NETWORKS[arch](width, channels, classes, tuple(size))


def network_of(args, data):
    """The arguments of build_network, as they are stored in every saved file."""
    _, channels, *size = data.train[0].shape
    return dict(arch=args.arch, width=args.width, channels=channels, classes=len(data.classes), size=size)


def prepare(model, args):
    """The network on its device, in the fast layout, compiled if --compile says so."""
    model.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        if args.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise UsageFault("argument --compile: torch.compile needs a C++ compiler, and none is on the PATH")
        model.compile()
    return model


def sgd(model, lr, epochs, data, args):
    """SGD with Nesterov momentum, and a learning rate that rises over a fifth of the steps and falls to 0 as a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), lr, args.momentum, weight_decay=args.weight_decay,
                                nesterov=args.momentum > 0, fused=True)
    steps = max(2, epochs * data.steps(args.batch_size))
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.2, cycle_momentum=False)


# ---------------------------------------------------------------- the attack

def margin_loss(logits, y):
    """Carlini and Wagner's l_inf objective, max of the others minus the true logit, (N,): positive is misclassified."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -math.inf).amax(1) - logits[true]


LOSSES = {"ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"), "margin": margin_loss}


@contextlib.contextmanager
def frozen(model):
    """Within it the weights take no gradient; running statistics are put back at its end."""
    weights = [p for p in model.parameters() if p.requires_grad]
    training = any(m.training for m in model.modules())
    buffers = [(b, b.clone()) for b in model.buffers()] if training else []
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def pgd(model, x, y, epsilon, step_size, num_steps, *, loss="ce", random_start=True, start=None, eot=1, generator=None,
        broken_at=None):
    """Projected gradient ascent in the l_inf ball (Madry et al. 2018): x <- clip(x + step_size * sign(grad loss)).

    x (N, C, H, W) in [0, 1], y (N,); epsilon and step_size in units of the pixel range. Returns x_adv, like x, within
    epsilon of x and within [0, 1]. FGSM is num_steps=1, step_size=epsilon, random_start=False.
    loss: 'ce', 'margin' or f(logits, y) -> (N,). start: first iterate instead of a random one. eot: gradients averaged
    over that many forward passes, for random networks. Weights, their .grad, modes and running statistics stay as they
    are: whether batch norm uses its running statistics is the caller's choice of model.eval().
    broken_at (N,), int, evaluation only: an image leaves the batch at its first misclassified iterate t, and
    broken_at becomes t. Raises Fault on a gradient that is not finite."""
    objective = LOSSES.get(loss, loss)
    lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    if start is None:
        start = x + epsilon * (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1) if random_start else x
    x_adv = torch.clamp(start, lower, upper)
    result, live = x_adv, torch.arange(len(x), device=x.device)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    with frozen(model), torch.enable_grad():
        for t in range(num_steps):
            x_adv = x_adv.detach().requires_grad_()
            gradient = 0
            for _ in range(eot):
                logits = model(x_adv).float()
                gradient = gradient + torch.autograd.grad(objective(logits, y).sum(), x_adv)[0]
            finite &= gradient.isfinite().all()
            x_next = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
            if broken_at is None:
                x_adv = x_next
                continue
            correct = logits.argmax(1) == y
            broken_at[live[~correct]] = t
            result = result.clone() if t == 0 else result
            result[live] = torch.where(correct[:, None, None, None], x_next, x_adv.detach())
            x_adv, lower, upper, y, live = (v[correct] for v in (x_next, lower, upper, y, live))
            if not len(live):
                break
    if not finite:
        raise Fault("the gradient of the attack is not finite: training has diverged (try a lower --lr, or --amp off)")
    return (x_adv if broken_at is None else result).detach()


# ---------------------------------------------------------------- evaluation

def interval(share, n, z=1.959964):
    """Wilson's 95 % interval of an accuracy, all in per cent."""
    p = share / 100
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(100 * max(0, middle - half) / (1 + z * z / n), 2), round(100 * min(1, (middle + half) / (1 + z * z / n)), 2)]


def per_cent(correct):
    return round(100 * correct.double().mean().item(), 3)


@contextlib.contextmanager
def judging(model, seed):
    """Evaluation mode, float32 without TF32, and random numbers of its own: what a judge needs, put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), \
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(seed)
        yield torch.Generator(device).manual_seed(seed)
    for module, mode in modes:
        module.training = mode


def logits_of(model, x):
    """The logits of one batch; Fault if one is not finite, for argmax of NaN is a class too."""
    logits = model(x)
    if not logits.isfinite().all():
        raise Fault("the network's logits are not finite: no accuracy can be reported")
    return logits


def is_random(model, x):
    """Whether two forward passes over the same images differ."""
    a, b = logits_of(model, x[:64]), logits_of(model, x[:64])
    return bool((a - b).abs().max() > 1e-4 * a.abs().max())


def first_break(model, images, generator, epsilon, step_size, num_steps, restarts=1, loss="ce", random_start=True,
                batch_size=250):
    """For each image the first iterate of any restart that is misclassified, (N,) int: -1 the clean image itself,
    0 the start, num_steps the last; one more than that: none was.

    Every restart begins with all images that are correct when clean, so that what happens at iterate t of restart r
    depends on nothing that comes after: more steps or restarts can only break more images."""
    x, y = images
    never = num_steps + 1
    result = torch.full_like(y, never)
    for restart in range(restarts):
        for i in progress(range(0, len(y), batch_size), f"attack {restart + 1}/{restarts}"):
            xb, yb = to_float(x[i:i + batch_size]), y[i:i + batch_size]
            start = xb + epsilon * (2 * torch.rand(xb.shape, generator=generator, device=xb.device) - 1)   # for all images
            broken = torch.where(logits_of(model, xb).argmax(1) == yb, never, -1)
            live = broken == never
            xb, yb, start, at = xb[live], yb[live], start[live] if random_start else xb[live], broken[live]
            if len(yb):
                x_adv = pgd(model, xb, yb, epsilon, step_size, num_steps, loss=loss, start=start, broken_at=at)
                at[(at == never) & (logits_of(model, x_adv).argmax(1) != yb)] = num_steps
                broken[live] = at
            result[i:i + batch_size] = torch.minimum(result[i:i + batch_size], broken)
    return result


def evaluate(model, images, *, epsilon, step_size, num_steps, restarts=1, loss="ce", random_start=True, eot=10, seed=0):
    """Clean and robust accuracy in per cent over images = (uint8 (N, C, H, W), labels), in float32.

    Robust is an image whose clean form and whose every iterate of every restart are classified correctly. A random
    network (two passes differ) gets gradients averaged over `eot` passes, the verdict on the last iterate and the mean
    over 10 draws instead, the worst of the restarts. Returns a dict of accuracies, 95 % intervals, image count and attack settings."""
    x, y = images
    attack = dict(norm="l_inf", epsilon=epsilon, step_size=step_size, num_steps=num_steps, restarts=restarts, loss=loss,
                  random_start=random_start, seed=seed)
    with judging(model, seed) as generator:
        if not is_random(model, to_float(x[:64])):
            broken = first_break(model, images, generator, epsilon, step_size, num_steps, restarts, loss, random_start)
            clean, robust = broken >= 0, broken > num_steps
        else:
            attack |= dict(eot=eot, draws=10)
            clean, robust = [], []
            for xb, yb in zip(map(to_float, x.split(250)), y.split(250)):
                def draws(inputs):
                    return torch.stack([logits_of(model, inputs).argmax(1) == yb for _ in range(10)]).double().mean(0)
                clean.append(draws(xb))
                robust.append(torch.stack([draws(pgd(model, xb, yb, epsilon, step_size, num_steps, loss=loss, eot=eot,
                                                     random_start=random_start, generator=generator))
                                           for _ in range(restarts)]).amin(0))
            clean, robust = torch.cat(clean), torch.cat(robust)
    clean_acc, robust_acc = per_cent(clean), per_cent(robust)
    return dict(clean_acc=clean_acc, clean_ci=interval(clean_acc, len(y)), robust_acc=robust_acc,
                robust_ci=interval(robust_acc, len(y)), images=len(y), attack=attack)


def sanity_flags(model, images, *, epsilon, step_size, num_steps, seed=0):
    """Signs that a robust accuracy cannot be trusted (after Carlini et al. 2019 and Athalye et al. 2018), as sentences.

    Judged on at most 250 images; an honest network raises none."""
    x, y = (t[:250] for t in images)
    flags, slack = [], max(2, 300 / len(y))                                     # points: 2, or 3 images
    with judging(model, seed) as generator:
        batch = to_float(x)
        logits = logits_of(model, batch)
        classes = logits.shape[1]
        if is_random(model, batch):
            flags.append("random output: two passes over one image differ")
        else:
            alone = torch.cat([logits_of(model, image[None]) for image in batch[:32]])
            if (alone - logits[:32]).abs().max() > 1e-4 * logits.abs().max():
                flags.append("batch-dependent output: an image's logits change with its neighbours")
        if logits.min() >= 0 and logits.max() <= 1 and (logits.sum(1) - 1).abs().max() < 1e-4:
            flags.append("probabilities instead of logits")
        with frozen(model), torch.enable_grad():
            leaf = batch.clone().requires_grad_()
            gradient, = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        zero = per_cent(gradient.flatten(1).abs().amax(1) == 0)
        if zero > 10:
            flags.append(f"zero gradients on {zero:.0f} % of the images")

        def robust(*settings, **more):
            return first_break(model, (x, y), generator, *settings, **more)

        twice = robust(epsilon, step_size, 2 * num_steps)
        pgd_acc, twice_acc = per_cent(twice > num_steps), per_cent(twice > 2 * num_steps)
        if pgd_acc - twice_acc > slack:
            flags.append(f"not converged: twice the steps lower {pgd_acc:.1f} % to {twice_acc:.1f} %")
        fgsm_acc = per_cent(robust(epsilon, epsilon, 1, random_start=False) > 1)
        if pgd_acc - fgsm_acc > slack:
            flags.append(f"FGSM ({fgsm_acc:.1f} %) is stronger than PGD ({pgd_acc:.1f} %)")
        still = torch.ones_like(y, dtype=torch.bool)
        for _ in range(20):
            sign = torch.randint(0, 2, batch.shape, generator=generator, device=batch.device) * 2 - 1
            still &= logits_of(model, (batch + epsilon * sign).clamp(0, 1)).argmax(1) == y
        if pgd_acc - per_cent(still) > slack:
            flags.append(f"random noise ({per_cent(still):.1f} %) is stronger than PGD ({pgd_acc:.1f} %)")
        wild_acc = per_cent(robust(1.0, 0.1, num_steps) > num_steps)
        if wild_acc > 100 / classes + 5:
            flags.append(f"epsilon 1 leaves {wild_acc:.1f} %, more than chance")
    return flags


def transfer(model, source, images, *, epsilon, step_size, num_steps, seed=0):
    """Accuracy in per cent under PGD examples made on another network, `source` (black box)."""
    correct = []
    with judging(source, seed) as generator, judging(model, seed):
        for xb, yb in zip(map(to_float, images[0].split(250)), images[1].split(250)):
            x_adv = pgd(source, xb, yb, epsilon, step_size, num_steps, generator=generator)
            correct.append(logits_of(model, x_adv).argmax(1) == yb)
    return per_cent(torch.cat(correct))


def autoattack(model, images, *, epsilon, seed=0):
    """Accuracy in per cent under AutoAttack (Croce and Hein 2020) from the optional package pyautoattack."""
    from pyautoattack import AutoAttack
    with judging(model, seed):
        x = to_float(images[0])
        version = "rand" if is_random(model, x) else "standard"
        judge = AutoAttack(model, eps=epsilon, norm="Linf", version=version, seed=seed, device=x.device)
        with torch.enable_grad():
            x_adv = judge.run_standard_evaluation(x, images[1], batch_size=250)
        x_adv = x_adv[0] if isinstance(x_adv, tuple) else x_adv
        return per_cent(torch.cat([logits_of(model, a).argmax(1) for a in x_adv.split(250)]) == images[1]), version


# ---------------------------------------------------------------- counting

def count_macs(model, network):
    """Multiply-accumulates of convolutions and linear layers for one image."""
    total = 0

    def add(module, _, out):
        nonlocal total
        per_output = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        total += out.numel() * per_output

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with judging(model, 0):
        model(torch.zeros(1, network["channels"], *network["size"], device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


def latency(models, network, batch_size, device):
    """Median milliseconds of a forward pass of each model, float32 and channels last, measured in turn in one loop."""
    x = to_float(torch.zeros(batch_size, network["channels"], *network["size"], dtype=torch.uint8, device=device))
    times, begin = [[] for _ in models], time.perf_counter()
    with torch.no_grad():
        while len(times[0]) < 5 or time.perf_counter() - begin < 1.0:
            for model, measured in zip(models, times):
                t = time.perf_counter()
                model(x)
                if device != "cpu":
                    torch.cuda.synchronize()
                measured.append(1000 * (time.perf_counter() - t))
    return [round(statistics.median(t[1:]), 3) for t in times]


# ---------------------------------------------------------------- files

def save_file(path, content):
    """Writes a dict of plain values and tensors so that the file is either whole or as it was before."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as fault:
        free = shutil.disk_usage(path.parent).free // 2**20
        raise Fault(f"{path} could not be written ({str(fault).splitlines()[0]}); {free} MiB are free there") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, keys):
    """Reads what save_file wrote; Fault unless it is whole, free of code, and holds `keys` and finite tensors."""
    path = Path(path)
    try:                                               # torch.load checks no checksum, zipfile does
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Fault(f"there is no file {path}") from None
    except Exception as fault:
        raise Fault(f"{path} is not a readable file of these scripts ({type(fault).__name__})") from None
    if damaged or not isinstance(content, dict) or content.get("format") != 1 or not keys <= content.keys():
        raise Fault(f"{path} is damaged" if damaged else f"{path} is not a file of these scripts (wanted {', '.join(sorted(keys))})")
    return content


def save_model(path, script, network, model, args, **more):
    """Writes a network as a file that load_model reads on any machine: arguments of the architecture and weights.

    `script` names the file beside common.py whose build(artifact) makes the network again."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    judged = {k: getattr(args, k) for k in ("dataset", "epsilon", "step_size", "eval_steps", "restarts")}
    save_file(path, dict(format=1, script=script, network=network, state=state, judged=judged, **more))


def read_model(path):
    """The artifact in a file that save_model wrote, and its network in eval mode."""
    artifact = read_file(path, {"script", "network", "state", "judged"})
    script = artifact["script"]
    if not str(script).isidentifier() or not Path(__file__).with_name(f"{script}.py").is_file():
        raise Fault(f"{path} was made by a script {script!r} that is not beside common.py")
    if not all(t.isfinite().all() for t in artifact["state"].values() if torch.is_tensor(t)):
        raise Fault(f"{path} holds weights that are not finite")
    try:
        if str(Path(__file__).parent) not in sys.path:
            sys.path.insert(0, str(Path(__file__).parent))
        model = importlib.import_module(script).build(artifact)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as fault:
        raise Fault(f"{path} does not fit the network it names ({str(fault).splitlines()[0]})") from None
    return artifact, model.eval()


def load_model(path):
    """The network in a saved file (model.pt, dense.pt) as a plain nn.Module in eval mode, on the CPU."""
    return read_model(path)[1]


def build(artifact):
    """The dense network of a dense.pt."""
    model = build_network(**artifact["network"])
    model.load_state_dict(artifact["state"])
    return model


def load_pretrained(model, path, network):
    """Loads a dense.pt into `model`; UsageFault if it holds another architecture."""
    artifact = read_model(path)[0]
    if artifact["script"] != "common" or artifact["network"] != network:
        raise UsageFault(f"argument --pretrained: {path} holds {artifact['network']} of {artifact['script']}.py, not {network}")
    model.load_state_dict(artifact["state"])


# ---------------------------------------------------------------- the run

def progress(items, label):
    """Iterates over `items`, with a line of progress and time to go on a terminal only."""
    if not sys.stderr.isatty():
        yield from items
        return
    begin, items = time.time(), list(items) if isinstance(items, range) else items
    total = items.total if hasattr(items, "total") else len(items)
    for i, item in enumerate(items):
        rest = (time.time() - begin) / i * (total - i) if i else 0
        print(f"\r{label} {i + 1}/{total} ETA {rest:.0f} s ", end="", file=sys.stderr, flush=True)
        yield item
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def plain(args):
    """The flags as stored and compared: all but those that say where and how a run continues."""
    return {k: v for k, v in vars(args).items() if k not in ("output", "resume", "data_dir", "workers", "device")}


class Run:
    """One run's output folder: its log, its checkpoint and its result.

    epochs() is the only loop a script needs: it yields the epochs that are still to do and saves after each. last.pt
    holds the phase, the epoch, the state of everything named there, the random states, and what once() computed."""
    active = False

    def __init__(self, args, data, script, argv):
        self.args, self.data, self.script, self.folder = args, data, script, Path(args.output)
        self.command = shlex.join(["python", f"{script}.py", *[a for a in argv if a != "--resume"]])
        self.result, self.restored, self.memo, self.seconds, self.phase = None, None, {}, {}, None
        done, last, log = self.folder / "result.json", self.folder / "last.pt", self.folder / "log.jsonl"
        if done.is_file() or last.is_file():
            checkpoint = None if done.is_file() else read_file(last, {"args", "phase", "epoch", "states", "memo", "random"})
            result = json.loads(done.read_text()) if done.is_file() else None
            before = result["args"] if result else checkpoint["args"]
            if json.dumps(before, sort_keys=True) != json.dumps(plain(args), sort_keys=True):
                changed = [k for k in plain(args) if before.get(k) != plain(args)[k]] or ["script"]
                raise UsageFault(f"argument --output: {self.folder} holds a different run (it differs in "
                                 f"{', '.join(changed)}); name another folder")
            if not args.resume:
                raise UsageFault(f"argument --output: {self.folder} holds this run, "
                                 + ("finished; --resume prints its result" if result else "unfinished; --resume continues it"))
            if result:
                self.result = result
                print(json.dumps(result, indent=1))
                return
            self.restored, self.memo, self.seconds = checkpoint, checkpoint["memo"], checkpoint["seconds"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(log, "a+")
        with contextlib.suppress(ImportError):                                   # no fcntl on Windows: no lock
            import fcntl
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageFault(f"argument --output: another process is running in {self.folder}") from None
        self.file.truncate(self.restored["log_size"] if self.restored else 0)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        Run.active = True
        if self.restored:
            print(f"continuing {self.folder} in phase {self.restored['phase']} after epoch {self.restored['epoch']}", flush=True)
        else:
            if args.resume:
                print(f"nothing to continue in {self.folder}: starting", flush=True)
            self.log(script=script, **vars(args))

    def log(self, **fields):
        """One line on stdout, key:value, and the same as JSON in log.jsonl."""
        if self.phase:
            fields = {"phase": self.phase, **fields}
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in fields.items() if not isinstance(v, dict)}
        print(" ".join(f"{k}:{v}" for k, v in shown.items()), flush=True)
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()

    def once(self, name, compute):
        """compute()'s value (plain data), computed once in the life of a run and stored with every checkpoint."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]

    def skips(self, phase):
        """Whether the run, when it was stopped, had already begun this phase: what prepares it need not be done again."""
        return bool(self.restored) and self.restored["phase"] == phase

    def epochs(self, phase, count, **stateful):
        """Yields the epochs 0 .. count-1 of a phase that are still to do; `stateful` objects are saved and restored."""
        first = 0
        if self.restored and self.restored["phase"] != phase:
            return                                                               # the run is past this phase
        self.phase = phase
        if self.restored:
            try:
                for name, thing in stateful.items():
                    thing.load_state_dict(self.restored["states"][name])
            except (KeyError, ValueError, RuntimeError) as fault:
                raise Fault(f"{self.folder / 'last.pt'} does not fit this run ({str(fault).splitlines()[0]})") from None
            self.generator.set_state(self.restored["random"]["batches"])
            torch.set_rng_state(self.restored["random"]["cpu"])
            if self.args.device != "cpu":
                torch.cuda.set_rng_state(self.restored["random"]["cuda"])
            first, self.restored = self.restored["epoch"], None
        else:
            self.save(0, stateful)
        begin, before = time.time(), self.seconds.get(phase, 0)
        for epoch in range(first, count):
            self.epoch = epoch + 1, count
            yield epoch
            self.seconds[phase] = round(before + time.time() - begin, 2)
            self.save(epoch + 1, stateful)
        self.phase = None

    def save(self, epoch, stateful):
        cuda = torch.cuda.get_rng_state() if self.args.device != "cpu" else None
        save_file(self.folder / "last.pt", dict(
            format=1, script=self.script, args=plain(self.args), phase=self.phase, epoch=epoch, memo=self.memo,
            states={name: thing.state_dict() for name, thing in stateful.items()}, seconds=self.seconds,
            random=dict(batches=self.generator.get_state(), cpu=torch.get_rng_state(), cuda=cuda),
            log_size=self.file.tell()))

    def batches(self):
        """The batches of one epoch, with progress on a terminal."""
        source = Sized(self.data.batches(self.args.batch_size, self.generator), self.data.steps(self.args.batch_size))
        return progress(source, f"{self.phase} {self.epoch[0]}/{self.epoch[1]}")

    def finish(self, **more):
        """Reads dense.pt and model.pt back, judges both, writes result.json and returns what is in it."""
        self.phase, args, device = "final", self.args, self.args.device
        begin = time.time()
        attack = dict(epsilon=args.epsilon, step_size=args.step_size, num_steps=args.eval_steps, seed=args.seed)
        files = [self.folder / "dense.pt", self.folder / "model.pt"]
        artifact = read_file(files[1], {"network"})
        models = [load_model(file).to(device, memory_format=torch.channels_last) for file in files]
        dense, compact = (evaluate(m, self.data.test, restarts=args.restarts, **attack) for m in models)
        flags = sanity_flags(models[1], self.data.test, **attack)
        parameters = [sum(p.numel() for p in m.parameters()) for m in models]
        macs = [count_macs(m, artifact["network"]) for m in models]
        size = [file.stat().st_size for file in files]
        self.seconds["final"] = round(time.time() - begin, 2)
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
        name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
        self.result = dict(
            script=self.script, command=self.command, folder=str(self.folder), args=plain(args), versions=versions,
            device=name, threads=torch.get_num_threads(), train_images=len(self.data.train[1]), **compact, flags=flags,
            dense=dense, parameters=parameters[1], dense_parameters=parameters[0],
            nonzeros=sum(int(p.count_nonzero()) for p in models[1].parameters()), macs=macs[1], dense_macs=macs[0],
            bytes=size[1], dense_bytes=size[0], params_ratio=round(parameters[0] / parameters[1], 3),
            bytes_ratio=round(size[0] / size[1], 3), macs_ratio=round(macs[0] / macs[1], 3),
            latency_ms={f"batch_{b}": dict(zip(("dense", "compact"), latency(models, artifact["network"], b, device)))
                        for b in (1, 128)}, seconds=self.seconds, **more)
        if device != "cpu":
            self.result["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        result = self.result
        self.log(clean_acc=compact["clean_acc"], robust_acc=compact["robust_acc"], dense_clean_acc=dense["clean_acc"],
                 dense_robust_acc=dense["robust_acc"], images=compact["images"], params_ratio=result["params_ratio"],
                 bytes=size[1], dense_bytes=size[0], bytes_ratio=result["bytes_ratio"], macs_ratio=result["macs_ratio"],
                 flags="; ".join(flags) or "none", seconds=sum(self.seconds.values()))
        temporary = self.folder / "result.json.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, self.folder / "result.json")
        Run.active = False
        return result


class Sized:
    """A generator that knows how many items it will yield."""

    def __init__(self, items, total):
        self.items, self.total = items, total

    def __iter__(self):
        return iter(self.items)


# ---------------------------------------------------------------- python common.py evaluate | compare

def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=lambda **k: Parser(k.pop("description")))
    p = commands.add_parser("evaluate", description="Judges a saved network.")
    p.add_argument("model", help="a model.pt or dense.pt")
    p.add_argument("--dataset", help="default: the one it was made for")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--workers", type=whole(1, 256), default=8, help="threads that decode class folders")
    p.add_argument("--eval-images", type=whole(0), help="test images, a balanced subset; 0 is all (default: 1000 on a CPU)")
    p.add_argument("--epsilon", type=radius)
    p.add_argument("--step-size", type=radius)
    p.add_argument("--eval-steps", type=whole(1, 10000))
    p.add_argument("--restarts", type=whole(1, 1000))
    p.add_argument("--loss", choices=LOSSES, default="ce", help="margin is Carlini and Wagner's, in l_inf")
    p.add_argument("--source", help="another saved network, whose PGD examples are tried too")
    p.add_argument("--autoattack", action="store_true", help="needs the package pyautoattack")
    p.add_argument("--seed", type=whole(0), default=0)
    p.add_argument("--device", default="auto")
    p = commands.add_parser("compare", description="Prints one Markdown table over finished runs.")
    p.add_argument("folders", nargs="+", help="folders with a result.json; runs that differ in the seed alone share a row")
    p.add_argument("--plot", help="a picture of robust accuracy against bytes (needs matplotlib)")
    args = parser.parse_args(argv)
    return evaluate_command(args) if args.command == "evaluate" else compare_command(args)


def evaluate_command(args):
    artifact, model = read_model(args.model)
    for key, value in artifact["judged"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.device = check_device(args.device)
    if args.eval_images is None:
        args.eval_images = 1000 if args.device == "cpu" else 0
    if args.autoattack:
        try:
            import pyautoattack  # noqa: F401
        except ImportError:
            raise UsageFault("argument --autoattack: the package pyautoattack is not installed") from None
    data = load_data(args)
    network, found = artifact["network"], list(data.test[0].shape[1:])
    if [network["channels"], *network["size"]] != found or network["classes"] != len(data.classes):
        raise UsageFault(f"argument --dataset: {args.dataset} has {len(data.classes)} classes of {found}, the network was "
                         f"made for {network['classes']} of {[network['channels'], *network['size']]}")
    model.to(args.device, memory_format=torch.channels_last)
    attack = dict(epsilon=args.epsilon, step_size=args.step_size, num_steps=args.eval_steps, seed=args.seed)
    result = dict(model=args.model, script=artifact["script"], dataset=args.dataset, bytes=Path(args.model).stat().st_size)
    result |= evaluate(model, data.test, restarts=args.restarts, loss=args.loss, **attack)
    result["flags"] = sanity_flags(model, data.test, **attack)
    n = len(data.test[1])
    if args.source:
        source = load_model(args.source).to(args.device, memory_format=torch.channels_last)
        result["transfer_acc"] = transfer(model, source, data.test, **attack)
        if result["robust_acc"] - result["transfer_acc"] > max(2, 300 / n):
            result["flags"].append(f"transfer ({result['transfer_acc']:.1f} %) is stronger than PGD")
    if args.autoattack:
        result["autoattack_acc"], result["autoattack_version"] = autoattack(model, data.test, epsilon=args.epsilon, seed=args.seed)
        result["autoattack_ci"] = interval(result["autoattack_acc"], n)
    print(json.dumps(result, indent=1))
    return result


def compare_command(args):
    groups = {}
    for folder in args.folders:
        try:
            result = json.loads((Path(folder) / "result.json").read_text())
            settings = {k: v for k, v in result["args"].items() if k not in ("seed", "pretrained")}
            groups.setdefault(json.dumps([result["script"], settings], sort_keys=True), []).append(result | {"at": folder})
        except (OSError, ValueError, KeyError) as fault:
            raise Fault(f"{folder} holds no readable result.json ({type(fault).__name__}: {fault})") from None
    first = [runs[0] for runs in groups.values()]
    told = [k for k in first[0]["args"] if len({json.dumps(r["args"].get(k)) for r in first}) > 1 and k not in ("seed", "pretrained")]

    def mean(runs, *path, digits=1):
        values = []
        for run in runs:
            for key in path:
                run = run[key]
            values.append(run)
        text = f"{statistics.mean(values):,.{digits}f}"
        return text if len(values) == 1 or min(values) == max(values) else \
            f"{text} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"

    print("| run | dense clean / robust | clean % | robust % | 95 % interval | bytes | bytes x | parameters x | MACs x | "
          "batch 1 ms (dense) | flags | folder |\n|" + "---|" * 12)
    for runs in groups.values():
        r = runs[0]
        name = " ".join([r["script"], r["args"]["dataset"], f"{r['args']['arch']}w{r['args']['width']}",
                         *(f"{k}={r['args'].get(k)}" for k in told if k not in ("dataset", "arch", "width"))])
        ci = "{} to {}".format(*r["robust_ci"]) if len(runs) == 1 else f"{len(runs)} seeds"
        flags = "; ".join(sorted({f for run in runs for f in run["flags"]})) or "none"
        print(f"| {name} | {mean(runs, 'dense', 'clean_acc')} / {mean(runs, 'dense', 'robust_acc')} | "
              f"{mean(runs, 'clean_acc')} | {mean(runs, 'robust_acc')} | {ci} | {mean(runs, 'bytes', digits=0)} | "
              f"{mean(runs, 'bytes_ratio')} | {mean(runs, 'params_ratio')} | {mean(runs, 'macs_ratio')} | "
              f"{mean(runs, 'latency_ms', 'batch_1', 'compact')} ({mean(runs, 'latency_ms', 'batch_1', 'dense')}) | "
              f"{flags} | {' '.join(run['at'] for run in runs)} |")
    if args.plot:
        try:
            import matplotlib
        except ImportError:
            raise UsageFault("argument --plot: the package matplotlib is not installed") from None
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        for script in sorted({r["script"] for r in first}):
            runs = [r for group in groups.values() for r in group if r["script"] == script]
            plt.scatter([r["bytes"] for r in runs], [r["robust_acc"] for r in runs], label=script)
        plt.scatter([r["dense_bytes"] for r in first], [r["dense"]["robust_acc"] for r in first], marker="x", label="dense")
        plt.xscale("log")
        plt.xlabel("bytes of the file")
        plt.ylabel("robust accuracy, %")
        plt.legend()
        plt.savefig(args.plot, dpi=120, bbox_inches="tight")
    return list(groups.values())


if __name__ == "__main__":
    from common import cli as run_cli, main as run_main    # one module, not two: faults and build() are common's own
    run_cli(run_main)
