"""What the four papers share: data, networks, PGD, evaluation, checkpoints, logs and compact files.

Nothing in this file belongs to one paper. A network takes images in [0, 1], (N, C, H, W), and gives logits.

  python common.py evaluate runs/DIR/model.pt   judges a saved network: PGD, margin loss, transfer, AutoAttack
  python common.py compare runs/*               one Markdown table over finished runs of all scripts
  python common.py bench                        what a training step costs, and what each paper adds to it
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
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

# The defaults of every data set; the keys are flags. The epochs are ours: digits fits two minutes of two CPU
# cores, the others are for a GPU: 80 in all, meant (not measured) to take ten minutes of an H200 on CIFAR-10.
# compress_epochs are those of the paper's own phase.
CIFAR = dict(arch="resnet18", width=16, pretrain_epochs=40, compress_epochs=20, finetune_epochs=20,
             batch_size=256, lr=0.2, epsilon=8 / 255, step_size=2 / 255, num_steps=10, ramp_epochs=0,
             crop=4, flip=True)
GREY = CIFAR | dict(width=4, crop=0, flip=False)
RECIPES = {
    "digits": GREY | dict(pretrain_epochs=15, compress_epochs=6, finetune_epochs=10, batch_size=64, lr=0.1,
                          epsilon=0.2, step_size=0.05),
    "mnist": GREY | dict(arch="lenet", batch_size=128, lr=0.05, epsilon=0.3, step_size=0.01, num_steps=40,
                         ramp_epochs=10),
    "cifar10": CIFAR, "cifar100": CIFAR, "svhn": CIFAR | dict(lr=0.1, flip=False)}


# ---------------------------------------------------------------- faults and flags

class Fault(RuntimeError):
    """A run-time fault: one sentence for the user, exit status 1."""
    status = 1


class UsageFault(Fault):
    """A wrong flag, or flags that contradict each other or the data: one line, status 2, nothing written."""
    status = 2


def first_line(fault):
    return str(fault).strip().partition("\n")[0] or type(fault).__name__


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line."""
    def __init__(self, description, **more):
        super().__init__(description=description.strip().splitlines()[0], allow_abbrev=False, **more)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(low, high, kind=float, hint=""):
    """An argparse type: a float (8/255 is one too) or int in [low, high]; nan and inf are not."""
    def convert(text):
        with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
            value = float(Fraction(text)) if kind is float else int(text)
            if low <= value <= high:
                return value
        wanted = "a number" if kind is float else "a whole number"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted} from {low} to {high}{hint}")
    return convert


def whole(low, high=10**9):
    return number(low, high, int)


radius = number(0, 1, hint=" (pixels are in [0, 1]: write 8/255, not 8)")


def resolve(parser, args, compress, **defaults):
    """Fills the flags not given, first from `defaults`, then from RECIPES, refuses contradictions, and seeds
    torch; compress names the flag that holds the epochs of the paper's own phase."""
    if args.dataset not in RECIPES and args.epsilon is None:
        parser.error(f"argument --dataset: {args.dataset} is none of {', '.join(RECIPES)}; a folder of "
                     "classes of your own needs --epsilon")
    if args.pretrained and args.pretrain_epochs:
        parser.error("argument --pretrain-epochs: not with --pretrained, which skips that phase")
    if args.pretrained:
        args.pretrain_epochs = 0
    recipe = RECIPES.get(args.dataset) or CIFAR | dict(step_size=args.epsilon / 4)
    for name, value in (recipe | {compress: recipe["compress_epochs"]} | defaults).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    args.device = check_device(args.device)
    if args.compile and not any(map(shutil.which, ("cc", "gcc", "c++", "g++", "clang++"))):
        parser.error("argument --compile: torch.compile needs a C++ compiler, and none is on the PATH")
    args.amp = args.amp == "on" or args.amp == "auto" and bfloat16_is_fast(args.device)
    torch.manual_seed(args.seed)
    return args


def check_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:1' -> 'cpu' or 'cuda:N'; UsageFault if that is not there."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    if name == "auto" or name == "cuda" and cuda:
        return [*cuda, "cpu"][0]
    if name not in ["cpu", *cuda]:
        raise UsageFault(f"argument --device: {name} is none of this machine's {', '.join(['cpu', *cuda])}")
    return name


def bfloat16_is_fast(device):
    """Whether the hardware multiplies bfloat16: training is then 2 to 3 times as fast as in float32."""
    if device != "cpu":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")        # absent in some builds of torch
    return any(getattr(torch.cpu, feature, bool)() for feature in features)


def autocast(args):
    """bfloat16 products in training where --amp says so; evaluation is always in float32."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp)


def cli(main):
    """Runs main(); a fault becomes one line and a status; a signal stops at once and says how to continue."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = message = None
    try:
        main()
    except Fault as fault:
        status, message = fault.status, fault
    except BrokenPipeError:                                      # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except torch.OutOfMemoryError:
        status, message = 1, "out of memory on the device; a smaller --batch-size or --width needs less"
    except OSError as fault:
        status, message = 1, fault
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = stop.code
    if status in (130, 143) and Run.active:
        command = shlex.join(["python", *(a for a in sys.argv if a != "--resume"), "--resume"])
        message = f"stopped; the last finished epoch is kept. To continue: {command}"
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- data

TORCHVISION = {"mnist": ("MNIST", "MNIST/raw"), "cifar10": ("CIFAR10", "cifar-10-batches-py"),
               "cifar100": ("CIFAR100", "cifar-100-python"), "svhn": ("SVHN", "train_32x32.mat")}


class Data:
    """A data set on the device: (uint8 images (N, C, H, W), labels (N,)) to train and to test on, and class
    names. A training batch is shuffled, cropped (after zero padding by `crop` pixels) and flipped there."""
    def __init__(self, train, test, classes, crop=0, flip=False):
        self.train, self.test, self.classes, self.crop, self.flip = train, test, classes, crop, flip

    def steps(self, batch_size):
        """Batches in an epoch, all full (or one of all images): what is left over, that epoch leaves out."""
        return max(1, len(self.train[1]) // batch_size)

    def batches(self, batch_size, generator):
        """Yields (x float (B, C, H, W) in [0, 1], y (B,)), one epoch in an order drawn from `generator`."""
        images, labels = self.train
        order = torch.randperm(len(labels), generator=generator, device=labels.device)
        for index in order[:self.steps(batch_size) * batch_size].split(batch_size):
            yield to_float(augment(images[index], self.crop, self.flip, generator)), labels[index]


def to_float(images):
    """uint8 -> float in [0, 1], channels last in memory, the convolutions' fast layout."""
    return images.float().div(255).contiguous(memory_format=torch.channels_last)


def augment(x, crop, flip, generator):
    """A random crop and a random horizontal flip of every image of x (B, C, H, W), as one gather."""
    if not crop and not flip:
        return x
    b, c, h, w = (torch.arange(n, device=x.device) for n in x.shape)
    dy, dx = torch.randint(0, 2 * crop + 1, (2, len(b), 1), generator=generator, device=x.device)
    rows, cols = dy + h, dx + w                                  # (B, H), (B, W)
    if flip:
        mirrored = torch.rand(len(b), 1, generator=generator, device=x.device) < 0.5
        cols = torch.where(mirrored, cols.flip(1), cols)
    return F.pad(x, (crop,) * 4)[b[:, None, None, None], c[:, None, None],
                                 rows[:, None, :, None], cols[:, None, None]]


def balanced(labels, count):
    """Indices (count,) of the first images of each class in turn, so that every prefix is balanced too."""
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, rank))[:count]


def load_data(args):
    """The data set that the flags name, as Data on args.device; nothing is substituted silently. It is looked
    for in args.data_dir as torchvision lays it out, then as class folders NAME/{train,test}/<class>/*; a
    known set that is absent is downloaded by torchvision. digits lies beside this file."""
    name, root = args.dataset, Path(args.data_dir)
    if name == "digits":
        train, test, classes = read_digits()
    elif (root / name / "train").is_dir() and not (root / TORCHVISION.get(name, (0, "-"))[1]).exists():
        train, test, classes = read_folders(root / name, args.workers)
        test = tuple(a[balanced(test[1], None)] for a in test)    # sorted by class till now
    else:
        train, test, classes = read_torchvision(name, root)
    default = min(1000, len(test[1])) if args.device == "cpu" else 0
    wanted = (("--train-images", getattr(args, "train_images", 0)),
              ("--eval-images", default if args.eval_images is None else args.eval_images))
    pairs = []
    for (images, labels), (flag, count) in zip((train, test), wanted):
        if count and not len(classes) <= count <= len(labels):
            raise UsageFault(f"argument {flag}: {count} is not from {len(classes)} to {len(labels)} (all)")
        if 0 < count < len(labels):
            chosen = balanced(labels, count)
            images, labels = images[chosen], labels[chosen]
        pairs.append(tuple(torch.from_numpy(a).to(args.device) for a in (images, labels.astype(np.int64))))
    recipe = RECIPES.get(name, CIFAR)
    return Data(*pairs, classes, recipe["crop"], recipe["flip"])


def read_digits():
    """1,797 real 8x8 digits (UCI, as in scikit-learn), grey levels 0 to 16; the last 360 are the test set."""
    with np.load(Path(__file__).parent / "data" / "digits.npz") as stored:
        images, labels = np.rint(stored["images"][:, None] * (255 / 16)).astype(np.uint8), stored["labels"]
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:]), [str(d) for d in range(10)]


def read_torchvision(name, root):
    """A known set as torchvision lays it out, downloaded by torchvision if it is absent."""
    if name not in TORCHVISION:
        raise UsageFault(f"argument --dataset: there is no folder {root / name / 'train'} of class folders")
    try:                            # RuntimeError, not ImportError, when torch and torchvision do not match
        import torchvision.datasets
        reader = getattr(torchvision.datasets, TORCHVISION[name][0])
        options = [dict(split=s) if name == "svhn" else dict(train=s == "train") for s in ("train", "test")]
        splits = [reader(str(root), download=True, **option) for option in options]
    except (ImportError, RuntimeError, OSError) as fault:
        raise Fault(f"{name} is neither in {root / TORCHVISION[name][1]} nor in {root / name}/train/<class>, "
                    f"and torchvision could not fetch or read it ({first_line(fault)}); put "
                    "the files there, or use --dataset digits, which needs none") from None
    pairs = []
    for split in splits:
        x, y = np.asarray(split.data), np.asarray(split.labels if name == "svhn" else split.targets)
        if name != "svhn":                                       # (N, H, W) or (N, H, W, C) -> (N, C, H, W)
            x = x[:, None] if name == "mnist" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        pairs.append((x, y))
    return *pairs, getattr(splits[0], "classes", [str(d) for d in range(10)])


def read_folders(root, workers):
    """Class folders ROOT/{train,test}/<class>/*, any type Pillow reads; decoded once, cached in one npz."""
    from PIL import Image
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    files, stamp = {"train": [], "test": []}, hashlib.sha1()
    for split, listed in files.items():
        folder = root / split
        found = sorted(e.name for e in os.scandir(folder) if e.is_dir()) if folder.is_dir() else []
        if found != classes or len(classes) < 2:
            raise Fault(f"{folder} has class folders {found}; wanted: those of {root / 'train'}, two or more")
        for label, name in enumerate(classes):
            images = sorted((e.path, e.stat()) for e in os.scandir(folder / name) if e.is_file())
            if not images:
                raise Fault(f"{folder / name} holds no images")
            listed += [(path, label) for path, _ in images]
            stamp.update("".join(f"{path} {s.st_size} {s.st_mtime_ns}\n" for path, s in images).encode())
    cache = root.with_name(f"{root.name}-cache.npz")
    unreadable = OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile
    with contextlib.suppress(*unreadable), np.load(cache) as stored:
        if str(stored["stamp"]) == stamp.hexdigest():
            return *((stored[f"{split}_x"], stored[f"{split}_y"]) for split in files), classes

    def read(path):
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError) as fault:      # SyntaxError: Pillow's word for a broken PNG
            raise Fault(f"{path} cannot be read as an image ({fault})") from None

    def decode(path):
        image = read(path)
        if image.size != size or image.mode[0] in "IF" or mode == "L" and image.mode not in ("L", "1"):
            raise Fault(f"{path} is {image.size} {image.mode}, the first image {size} {mode}: all must match")
        return np.asarray(image.convert(mode)).reshape(*size[::-1], -1).transpose(2, 0, 1)
    first = read(files["train"][0][0])
    size, mode = first.size, "L" if first.mode in ("L", "1") else "RGB"
    arrays = {"stamp": np.array(stamp.hexdigest())}
    with ThreadPoolExecutor(workers) as pool:
        for split, listed in files.items():
            images = np.empty((len(listed), 1 if mode == "L" else 3, *size[::-1]), np.uint8)
            for i, pixels in enumerate(pool.map(decode, [path for path, _ in listed])):
                images[i] = pixels
            arrays |= {f"{split}_x": images, f"{split}_y": np.array([label for _, label in listed])}
    with contextlib.suppress(OSError):                           # a read-only folder: decoded every time
        temporary = cache.with_name(f"{cache.stem}-{os.getpid()}.tmp.npz")
        np.savez(temporary, **arrays)
        os.replace(temporary, cache)
    return *((arrays[f"{split}_x"], arrays[f"{split}_y"]) for split in files), classes


# ---------------------------------------------------------------- networks

def conv3x3(c_in, c_out, stride=1, bias=False):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                                          nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images, with the layer names of the common CIFAR implementation."""
    def __init__(self, width, channels, classes, size):
        super().__init__()
        w = [4 * width] + [c * width for c in (4, 8, 16, 32)]
        self.conv1, self.bn1 = conv3x3(channels, w[0]), nn.BatchNorm2d(w[0])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(w[i], w[i + 1], 2 if i else 1), BasicBlock(w[i + 1], w[i + 1], 1))
            for i in range(4))
        self.linear = nn.Linear(w[4], classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class VGG16(nn.Module):
    """VGG-16 with batch norm, convolution biases and one linear layer: the ADMM paper's."""
    def __init__(self, width, channels, classes, size):
        super().__init__()
        layers, c_in = [], channels
        for stage, count in ((4, 2), (8, 2), (16, 3), (32, 3), (32, 3)):
            for _ in range(count):
                layers += [conv3x3(c_in, stage * width, bias=True), nn.BatchNorm2d(stage * width), nn.ReLU()]
                c_in = stage * width
            layers.append(nn.MaxPool2d(2))
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
        return out + (self.shortcut(h) if self.shortcut else x)


class WRN28_4(nn.Module):
    """Wide ResNet 28-4, pre-activation, without the unused extra block that some public copies carry."""
    def __init__(self, width, channels, classes, size):
        super().__init__()
        w = [c * width for c in (1, 4, 8, 16)]
        self.conv1 = conv3x3(channels, width)
        self.block1, self.block2, self.block3 = (
            nn.Sequential(WideBlock(w[i], w[i + 1], 2 if i else 1),
                          *(WideBlock(w[i + 1], w[i + 1], 1) for _ in range(3))) for i in range(3))
        self.bn1, self.fc = nn.BatchNorm2d(w[3]), nn.Linear(w[3], classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class LeNet(nn.Module):
    """The ADMM paper's LeNets: the padded one (MNIST) for one channel, the unpadded one (CIFAR) for more."""
    def __init__(self, width, channels, classes, size):
        super().__init__()
        c1, c2, *hidden, pad = (2, 4, 64, 2) if channels == 1 else (6, 16, 120, 84, 0)
        self.conv1 = nn.Conv2d(channels, c1 * width, 5, padding=pad)
        self.conv2 = nn.Conv2d(c1 * width, c2 * width, 5, padding=pad)
        h, w = (((s - 4 + 2 * pad) // 2 - 4 + 2 * pad) // 2 for s in size)
        n = [c2 * width * h * w, *(units * width for units in hidden), classes]
        self.fc = nn.ModuleList(nn.Linear(n[i], n[i + 1]) for i in range(len(n) - 1))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        for layer in self.fc[:-1]:
            x = F.relu(layer(x))
        return self.fc[-1](x)


class CNN(nn.Sequential):
    """HYDRA's networks for verifiable training: convolutions (channels at width 16, kernel, stride), ReLU and
    linear layers, and nothing else, so that bounds can be propagated through them."""
    def __init__(self, width, channels, classes, size, convs, linear):
        layers, (h, w) = [], size
        for c, kernel, stride in convs:
            layers += [nn.Conv2d(channels, -(-c * width // 16), kernel, stride, padding=1), nn.ReLU()]
            channels, h, w = layers[-2].out_channels, *((n + 2 - kernel) // stride + 1 for n in (h, w))
        layers, units = [*layers, nn.Flatten()], channels * h * w
        for n in linear:
            layers += [nn.Linear(units, -(-n * width // 16)), nn.ReLU()]
            units = layers[-2].out_features
        super().__init__(*layers, nn.Linear(units, classes))


CNN_SMALL = dict(convs=((16, 4, 2), (32, 4, 2)), linear=(100,))
CNN_LARGE = dict(convs=((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)), linear=(512, 512))
NETWORKS = {"resnet18": ResNet18, "vgg16": VGG16, "wrn28_4": WRN28_4, "lenet": LeNet,
            "cnn_small": lambda *network: CNN(*network, **CNN_SMALL),
            "cnn_large": lambda *network: CNN(*network, **CNN_LARGE)}


def build_network(arch, width, channels, classes, size):
    """A network of NETWORKS for images (channels, *size), width 16 being standard; UsageFault if too deep."""
    least = {"resnet18": 8, "vgg16": 32, "lenet": 4 if channels == 1 else 16}.get(arch, 4)
    if min(size) < least:
        raise UsageFault(f"argument --arch: {arch} is too deep for {size[0]}x{size[1]}; its least is {least}")
    return NETWORKS[arch](width, channels, classes, size)


def network_of(args, data):
    """The arguments of build_network, which are stored in every saved network."""
    _, channels, *size = data.train[0].shape
    return dict(arch=args.arch, width=args.width, channels=channels, classes=len(data.classes), size=size)


def channel_groups(model):
    """Which channels stand or fall together: [(writers, norms, readers)], names of layers. The channels of a
    group are the sum of its writers' outputs, {layer: batch norm on it alone, or None}; norms are the batch
    norms on the sum, readers the layers that take it in, a linear one perhaps as many features a channel."""
    def group(writer, norm=None):
        groups.append(({writer: norm}, [], []))
        return groups[-1]

    groups = []
    if not isinstance(model, (ResNet18, WRN28_4)):               # a chain
        for name, m in model.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                if groups:
                    groups[-1][2].append(name)
                group(name)
            elif isinstance(m, nn.BatchNorm2d):
                groups[-1][0].update(dict.fromkeys(groups[-1][0], name))
        return groups[:-1]

    resnet = isinstance(model, ResNet18)
    stream = group("conv1", "bn1" if resnet else None)
    for name, block in model.named_modules():
        if isinstance(block, (BasicBlock, WideBlock)):
            stream[2].append(f"{name}.conv1")
            group(f"{name}.conv1", f"{name}.bn1" if resnet else f"{name}.bn2")[2].append(f"{name}.conv2")
            if not resnet:
                stream[1].append(f"{name}.bn1")
            if block.conv1.in_channels != block.conv1.out_channels:
                shortcut = f"{name}.shortcut.0" if resnet else f"{name}.shortcut"
                stream[2].append(shortcut)
                stream = group(shortcut, f"{name}.shortcut.1" if resnet else None)
            stream[0][f"{name}.conv2"] = f"{name}.bn2" if resnet else None
    stream[2].append("linear" if resnet else "fc")
    if not resnet:
        stream[1].append("bn1")
    return groups


def without_channels(state, groups, alive):
    """A state dict of which only the channels `alive`, a boolean (channels,) for each group, are left."""
    rows, columns, left = {}, {}, {}
    for (writers, norms, readers), kept in zip(groups, alive):
        rows |= dict.fromkeys([*writers, *writers.values(), *norms], kept)
        columns |= dict.fromkeys(readers, kept)
    for key, t in state.items():
        name = key.rpartition(".")[0]
        if t.dim() and name in rows:
            t = t[rows[name]]
        if t.dim() > 1 and name in columns:
            t = t[:, columns[name].repeat_interleave(t.shape[1] // len(columns[name]))]
        left[key] = t
    return left


def resized(model, state):
    """The model with that state, its layers made smaller or larger in place where the state's weights are."""
    for name, m in list(model.named_modules()):
        s, *c = getattr(state.get(f"{name}.weight"), "shape", (0,))
        if not s or m.weight.shape == (s, *c):
            continue
        if isinstance(m, nn.Conv2d):
            new = nn.Conv2d(c[0], s, m.kernel_size, m.stride, m.padding, m.dilation, bias=m.bias is not None)
        else:
            new = nn.Linear(c[0], s, m.bias is not None) if c else nn.BatchNorm2d(s)
        model.set_submodule(name, new.to(m.weight))
    model.load_state_dict(state)
    return model


def largest(values, ratio):
    """Boolean (n,), True for exactly ceil(n / ratio) of values (n,): the largest, the first among equals."""
    kept = math.ceil(len(values) / Fraction(ratio).limit_denominator(10**6))
    least = values.kthvalue(len(values) + 1 - kept).values
    above, equal = values > least, values == least
    return above | equal & (equal.cumsum(0) <= kept - above.sum())


def parameter_masks(model, masks, filters):
    """{parameter: boolean like it} from {layer: mask of its weight, True where it stays}; where filters are
    pruned, also of the biases and batch norms of the dead, which would otherwise go on giving constants."""
    out = {f"{name}.weight": mask for name, mask in masks.items()}
    for writers, norms, _ in channel_groups(model) if filters else ():
        alive = {name: masks[name].flatten(1).any(1) for name in writers}            # (S,)
        for name, norm in writers.items():
            out |= {f"{name}.bias": alive[name], f"{norm}.weight": alive[name], f"{norm}.bias": alive[name]}
        for norm in norms:                                           # of a sum: dead where all of it is
            out |= dict.fromkeys((f"{norm}.weight", f"{norm}.bias"), torch.stack([*alive.values()]).any(0))
    return {name: out[name] for name, _ in model.named_parameters() if name in out}


@torch.no_grad()
def apply_masks(model, masks):
    """Sets what is pruned to zero, in place; masks are those of parameter_masks."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask, 0)


def remove_filters(model, masks):
    """A smaller network that gives the same, without the channels that no layer writes and what reads them;
    and its masks, of what is still zero: a filter that is dead where another writes to the same channel."""
    groups = channel_groups(model)
    alive = [torch.stack([masks[f"{name}.weight"].flatten(1).any(1) for name in writers]).any(0)
             for writers, _, _ in groups]
    left = without_channels(masks, groups, alive)
    return resized(model, without_channels(model.state_dict(), groups, alive)), left


def prepare(model, args):
    """The network on its device, in the fast memory layout, compiled where --compile says so."""
    model.to(args.device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    if args.compile:
        model.compile()
    return model


def sgd(model, lr, epochs, data, args):
    """SGD with Nesterov momentum; the rate rises to lr in a fifth of the steps and falls to 0 as a cosine."""
    opt = torch.optim.SGD(model.parameters(), lr, args.momentum, weight_decay=args.weight_decay,
                          nesterov=args.momentum > 0, fused=True)
    return opt, one_cycle(opt, lr, epochs * data.steps(args.batch_size))


def one_cycle(optimizer, lr, steps):
    """The rate of sgd() for any optimizer; 0.2 of 5 would be one step, by which OneCycleLR would divide."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(1, steps) + 1, cycle_momentum=False,
                                               pct_start=0.3 if steps == 4 else 0.2)


# ---------------------------------------------------------------- the attack

def margin_loss(logits, y):
    """Carlini and Wagner's l_inf loss (N,): largest other logit minus the true one, > 0 if misclassified."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -math.inf).amax(1) - logits[true]


LOSSES = {"ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"), "margin": margin_loss}


@contextlib.contextmanager
def frozen(model):
    """Within it weights take no gradient, which torch.compile would compute; statistics are put back."""
    weights = [p for p in model.parameters() if p.requires_grad]
    buffers = [(b, b.clone()) for b in model.buffers()] if any(m.training for m in model.modules()) else []
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        for buffer, before in buffers:
            buffer.copy_(before)


def pgd(model, x, y, epsilon, step_size, num_steps, *, loss="ce", random_start=True, start=None, eot=1,
        generator=None, broken_at=None):
    """Projected gradient ascent, l_inf (Madry et al. 2018): x <- clip(x + step_size * sign(grad loss)).

    x (N, C, H, W) in [0, 1], y (N,); epsilon, step_size in units of the pixel range. Returns x_adv, like x,
    within epsilon of x and within [0, 1]. FGSM is num_steps=1, step_size=epsilon, random_start=False.
    loss: 'ce', 'margin' or f(logits, y) -> (N,). start: the first iterate, instead of a random one. eot:
    gradients are averaged over that many passes, for random networks. Weights, .grad, modes and running
    statistics stay as they are; whether batch norm uses the latter is the caller's choice of model.eval().
    broken_at (N,) int, for evaluation: an image leaves the batch at its first misclassified iterate t, which
    is written there. Raises Fault on a gradient that is not finite."""
    objective = LOSSES.get(loss, loss)
    lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    if start is None:
        noise = torch.rand(x.shape, generator=generator, device=x.device) if random_start else 0.5
        start = x + epsilon * (2 * noise - 1)
    x_adv = torch.clamp(start, lower, upper)
    done, live, finite = x_adv.clone(), torch.arange(len(x), device=x.device), True
    with frozen(model), torch.enable_grad():
        for t in range(num_steps):
            x_adv = x_adv.detach().requires_grad_()
            gradient = 0
            for _ in range(eot):
                logits = model(x_adv).float()
                gradient = gradient + torch.autograd.grad(objective(logits, y).sum(), x_adv)[0]
            finite = gradient.isfinite().all() & finite
            x_next = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
            if broken_at is not None:
                right = logits.argmax(1) == y
                done[live[~right]], broken_at[live[~right]] = x_adv.detach()[~right], t
                x_next, lower, upper, y, live = (v[right] for v in (x_next, lower, upper, y, live))
            x_adv = x_next
            if not len(live):
                break
    if not finite:
        raise Fault("the attack's gradient is not finite: training diverged (try a lower --lr, or --amp off)")
    done[live] = x_adv.detach()
    return done


# ---------------------------------------------------------------- evaluation and counting

def interval(accuracy, n, z=1.959964):
    """Wilson's 95 % interval [low, high] of an accuracy over n images, all in per cent."""
    p, spread = accuracy / 100, z * z / n
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return [round(100 * (middle + s * half) / (1 + spread), 2) for s in (-1, 1)]


def per_cent(correct):
    return round(100 * correct.double().mean().item(), 3)


@contextlib.contextmanager
def judging(*models, seed=0):
    """Eval mode, no gradients, float32 without TF32, random numbers of their own; all put back afterwards."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    device = next(models[0].parameters()).device
    for model in models:
        model.eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), \
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(seed)
        yield torch.Generator(device).manual_seed(seed)
    for module, mode in modes:
        module.training = mode


def logits_of(model, x):
    """The logits of one batch; Fault if one is not finite, for the argmax of NaN looks like a class."""
    logits = model(x)
    if not logits.isfinite().all():
        raise Fault("the network's logits are not finite: no accuracy can be reported")
    return logits


def share_right(model, x, y, draws):
    """(N,) float: in how many of so many passes each image is classified correctly, from 0 to 1."""
    return torch.stack([logits_of(model, x).argmax(1) == y for _ in range(draws)]).double().mean(0)


def is_random(model, x):
    """Whether two forward passes over x differ."""
    a, b = logits_of(model, x), logits_of(model, x)
    return bool((a - b).abs().max() > 1e-4 * a.abs().max())


def first_break(model, images, generator, *, epsilon, step_size, num_steps, restarts=1, loss="ce",
                random_start=True):
    """(N,) int, the first misclassified iterate over all restarts: -1 is the clean image, num_steps the last
    iterate, num_steps + 1 none. A restart begins with all images that are right when clean, so what happens
    at iterate t of restart r depends on nothing later: more steps or restarts can only break more images."""
    out = torch.full_like(images[1], num_steps + 1)
    for r in range(restarts):
        for x, y, first in progress(batched(*images, out), f"attack {r + 1}/{restarts}", len(out) // 250 + 1):
            noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1   # drawn for all images
            right = logits_of(model, x).argmax(1) == y
            first[~right] = -1
            if right.any():
                x, y, at = x[right], y[right], torch.full_like(y[right], num_steps + 1)
                start = x + epsilon * noise[right] if random_start else x
                x_adv = pgd(model, x, y, epsilon, step_size, num_steps, loss=loss, start=start, broken_at=at)
                at[(logits_of(model, x_adv).argmax(1) != y) & (at > num_steps)] = num_steps
                first[right] = torch.minimum(first[right], at)
    return out


def batched(images, labels, *more):
    """Yields (x float, y, ...) in batches; what comes after y are views that may be written to."""
    size = 1000 if images.is_cuda else 250
    for x, *rest in zip(images.split(size), labels.split(size), *(m.split(size) for m in more)):
        yield to_float(x), *rest


def evaluate(model, images, *, epsilon, step_size, num_steps, restarts=1, loss="ce", random_start=True,
             eot=10, seed=0, more=None):
    """Clean and robust accuracy in per cent over images = (uint8 (N, C, H, W), labels (N,)), in float32.

    Robust is an image whose clean form and whose every iterate of every restart are classified correctly. A
    random network instead gets gradients averaged over `eot` passes, and as verdict on an image in how many
    of 10 passes it is right: the least of the clean form and of the last iterate of every restart. Returns a
    dict: accuracies, 95 % intervals, images, attack, and what more(model, robust) adds, robust (N,) being the
    verdict on each image."""
    attack = dict(epsilon=epsilon, step_size=step_size, num_steps=num_steps, restarts=restarts, loss=loss,
                  random_start=random_start)
    with judging(model, seed=seed) as generator:
        if not is_random(model, to_float(images[0][:64])):
            first = first_break(model, images, generator, **attack)
            clean, robust = first >= 0, first > num_steps
        else:
            attack |= dict(eot=eot, draws=10)
            clean = torch.cat([share_right(model, x, y, 10) for x, y in batched(*images)])
            hope, robust = clean > 0, clean.clone()                  # the others are not attacked
            for _ in range(restarts):
                attacked = ((pgd(model, x, y, epsilon, step_size, num_steps, loss=loss, eot=eot,
                                 random_start=random_start, generator=generator), y)
                            for x, y in batched(*(t[hope] for t in images)))
                found = [share_right(model, x_adv, y, 10) for x_adv, y in attacked if len(y)]
                robust[hope] = torch.minimum(robust[hope], torch.cat([clean[:0], *found]))
    said = more(model, robust) if more else {}
    n, clean, robust = len(clean), per_cent(clean), per_cent(robust)
    return dict(clean_acc=clean, clean_ci=interval(clean, n), robust_acc=robust, **said,
                robust_ci=interval(robust, n), images=n, attack=dict(norm="l_inf", **attack, seed=seed))


def sanity_flags(model, images, *, epsilon, step_size, num_steps, eot=10, seed=0):
    """Signs that a robust accuracy cannot be trusted (after Carlini et al. 2019, Athalye et al. 2018), as
    sentences. Judged on the first 250 images, 100 of them if the network is random, which is attacked and
    judged as in evaluate(); an honest network raises none but that."""
    with judging(model, seed=seed):
        random = is_random(model, to_float(images[0][:64]))
    images = [t[:100 if random else 250] for t in images]
    x, y, flags, slack = to_float(images[0]), images[1], [], max(2, 300 / len(images[1]))  # 2 % or 3 images
    with judging(model, seed=seed) as generator:
        def robust(steps, epsilon, step_size, count=None, **more):
            attack = dict(epsilon=epsilon, step_size=step_size, **more)
            if random:
                judged = {n: evaluate(model, images, num_steps=n, eot=eot, seed=seed, **attack)["robust_acc"]
                          for n in {count or steps, steps}}
                return judged[count or steps], judged[steps]
            first = first_break(model, images, generator, num_steps=steps, **attack)
            return per_cent(first > (count or steps)), per_cent(first > steps)
        logits = logits_of(model, x)
        alone = torch.cat([logits_of(model, image[None]) for image in x[:32]])
        if random:
            flags.append("random output, expected of a network with noise: two passes over one image differ")
        elif (alone - logits[:32]).abs().max() > 1e-4 * logits.abs().max():
            flags.append("batch-dependent output: an image's logits change with its neighbours")
        if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-4:
            flags.append("probabilities instead of logits")
        with frozen(model), torch.enable_grad():
            leaf = x.clone().requires_grad_()
            gradient, = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        zero = per_cent(gradient.flatten(1).abs().amax(1) == 0)
        if zero > 10:
            flags.append(f"zero gradients on {zero:.0f} % of the images")
        once, twice = robust(2 * num_steps, epsilon, step_size, num_steps)
        if once - twice > slack:
            flags.append(f"not converged: twice the steps lower {once:.1f} % to {twice:.1f} %")
        fgsm, _ = robust(1, epsilon, epsilon, random_start=False)
        if once - fgsm > slack:
            flags.append(f"FGSM ({fgsm:.1f} %) is stronger than PGD ({once:.1f} %)")
        bits = (torch.randint(0, 2, x.shape, generator=generator, device=x.device) for _ in range(20))
        noisy = ((x + epsilon * (b * 2 - 1)).clamp(0, 1) for b in bits)
        if random:                                               # its own mistakes would add up over the 20
            noise = min(per_cent(share_right(model, n, y, 10)) for n in noisy)
        else:
            noise = per_cent(torch.stack([logits_of(model, n).argmax(1) == y for n in noisy]).all(0))
        if once - noise > slack:
            flags.append(f"random noise ({noise:.1f} %) is stronger than PGD ({once:.1f} %)")
        wild, _ = robust(num_steps, 1.0, 0.1)
        if wild > 100 / logits.shape[1] + 5:
            flags.append(f"epsilon 1 leaves {wild:.1f} %, more than chance")
    return flags


def transfer(model, source, images, *, epsilon, step_size, num_steps, eot=10, seed=0):
    """Accuracy in per cent under PGD examples made on another network, `source`; of random networks as in
    evaluate()."""
    with judging(source, model, seed=seed) as generator:
        x = to_float(images[0][:64])
        eot, draws = (n if is_random(m, x) else 1 for m, n in ((source, eot), (model, 10)))
        pairs = ((pgd(source, x, y, epsilon, step_size, num_steps, eot=eot, generator=generator), y)
                 for x, y in batched(*images))
        return per_cent(torch.cat([share_right(model, x_adv, y, draws) for x_adv, y in pairs]))


def autoattack(model, images, *, epsilon, seed=0):
    """Accuracy in per cent under AutoAttack (Croce and Hein 2020; optional pyautoattack), and its version.
    It targets 9 classes an image, or all others; Fault below the four classes that it needs."""
    from pyautoattack import AutoAttack
    with judging(model, seed=seed):
        x, y = to_float(images[0]).contiguous(), images[1]       # its gradients may not be channels last
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        version = "rand" if is_random(model, x[:64]) else "standard"
        judge = AutoAttack(model, eps=epsilon, norm="Linf", version=version, seed=seed, device=x.device)
        classes = logits_of(model, x[:1]).shape[1]
        if classes < 4:
            raise Fault(f"AutoAttack needs four classes or more, and this network has {classes}")
        judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = min(9, classes - 1)
        with torch.enable_grad():
            x_adv = judge.run_standard_evaluation(x, y, batch_size=250)[0]
        return per_cent(torch.cat([logits_of(model, x).argmax(1) for x in x_adv.split(250)]) == y), version


def count_macs(model, network):
    """Multiply-accumulates of all convolutions and linear layers for one image."""
    def add(module, _, out):
        each = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        counts.append(out.numel() * each)
    counts, layers = [], [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with judging(model):
        model(torch.zeros(1, network["channels"], *network["size"], device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def seconds_of(function, device):
    """How long function() takes, on the device too."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda _: None
    wait(device)
    begin = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - begin


@torch.no_grad()
def latency(models, network, batch_size, device):
    """Median milliseconds of each model's forward pass, float32, channels last, timed in turn in one loop."""
    shape = batch_size, network["channels"], *network["size"]
    x = to_float(torch.zeros(shape, dtype=torch.uint8, device=device))
    times, begin = [[] for _ in models], time.perf_counter()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        while len(times[0]) < 6 or time.perf_counter() - begin < 0.5:
            for model, measured in zip(models, times):
                measured.append(1000 * seconds_of(lambda: model(x), device))
    return [round(statistics.median(t[1:]), 3) for t in times]   # the first one warms up


def peak_memory():
    """Bytes of main memory that this process held at most; None where the system does not tell."""
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- files

def save_file(path, content):
    """Writes a dict of plain values and tensors: afterwards the file is whole, or what it was before."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as fault:
        free = shutil.disk_usage(path.parent).free // 2**20
        raise Fault(f"{path} was not written ({first_line(fault)}); {free} MiB are free") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, *keys):
    """What save_file wrote; Fault unless the file is whole, free of code, and holds `keys`."""
    try:                                                         # torch.load checks no checksum; zipfile does
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == 1 and all(key in content for key in keys):
            return content
        raise KeyError
    except FileNotFoundError:
        raise Fault(f"there is no file {path}") from None
    except Exception as fault:
        raise Fault(f"{path} is damaged or not a file of these scripts ({type(fault).__name__})") from None


def kept_values(t):
    """(form, boolean like t): the values of a tensor to store, for the form that takes the fewest bits: all;
    those of the columns (..., c, h, w) that are not zero in every row; or those that are not zero."""
    matrix = t.flatten(1) if t.dim() > 1 else t[None]
    forms = {"all": torch.ones_like(matrix, dtype=torch.bool), "nonzero": matrix != 0}
    forms["columns"] = forms["nonzero"].any(0).expand_as(matrix)
    maps = {"all": 0, "nonzero": t.numel(), "columns": matrix.shape[1]}
    form = min(maps, key=lambda form: 32 * int(forms[form].sum()) + maps[form])
    return form, forms[form].view(t.shape)


def save_model(path, script, network, model, args, state=None, **more):
    """Writes a network as a file that load_model reads on any machine; script.build(artifact) makes it again,
    from `state` where the model's own is not what is to be stored.

    All values stand in one tensor (a record of its own for each would be a sixth of a small file), and zeros
    are left out where a bit map of what is kept, packed eight to a byte, costs less."""
    state = {name: t.detach().cpu() for name, t in (state or model.state_dict()).items()}
    floats, forms, bits, values = {n: t for n, t in state.items() if t.is_floating_point()}, {}, [], []
    for name, t in floats.items():
        forms[name], kept = kept_values(t)
        values.append(t[kept])
        if forms[name] != "all":
            bits.append(kept.flatten(1)[0] if forms[name] == "columns" else kept.flatten())
    judged = ("dataset", "epsilon", "step_size", "eval_steps", "restarts", "eot")
    judged = {k: getattr(args, k) for k in judged if k in args}
    save_file(path, dict(
        format=1, script=script, network=network, judged=judged, **more, values=torch.cat(values),
        bits=torch.from_numpy(np.packbits(torch.cat(bits).numpy()) if bits else np.empty(0, np.uint8)),
        forms={name: form for name, form in forms.items() if form != "all"},
        shapes={name: list(t.shape) for name, t in floats.items()},
        counters={name: t.item() for name, t in state.items() if name not in floats}))


def unpacked(artifact):
    """The state dict that save_model packed; ValueError or RuntimeError where the parts do not fit."""
    values, forms, state = artifact["values"], artifact.get("forms", {}), {}
    bits = torch.from_numpy(np.unpackbits(artifact["bits"].numpy())).bool() if forms else None
    for name, shape in artifact["shapes"].items():
        form, size = forms.get(name, "all"), math.prod(shape)
        kept = torch.ones(size, dtype=torch.bool)
        if form != "all":
            count = math.prod(shape[1:]) if form == "columns" else size
            part, bits = bits[:count], bits[count:]
            kept = part.repeat(size // count)
        taken, values = values.split([int(kept.sum()), len(values) - int(kept.sum())])
        state[name] = torch.zeros(size, dtype=values.dtype).masked_scatter_(kept, taken).view(shape)
    if len(values) or forms and len(bits) > 7:
        raise ValueError(f"{len(values)} values too many, or bits")
    return state | {name: torch.tensor(count) for name, count in artifact["counters"].items()}


def read_model(path):
    """What save_model wrote, with the weights as artifact["state"], and the network: an nn.Module in eval
    mode."""
    artifact = read_file(path, "script", "network", "judged", "values", "shapes", "counters")
    script, folder = str(artifact["script"]), Path(__file__).resolve().parent
    if not script.isidentifier() or not (folder / f"{script}.py").is_file():
        raise Fault(f"{path} was made by a script named {script}, which is not beside common.py")
    sys.path.insert(0, str(folder))                       # common.py may be imported from elsewhere
    try:
        if not artifact["values"].isfinite().all():
            raise ValueError("weights are not finite")
        artifact["state"], network = unpacked(artifact), artifact["network"]
        model = importlib.import_module(script).build(artifact).eval()
        with torch.no_grad():
            if model(torch.zeros(1, network["channels"], *network["size"])).shape != (1, network["classes"]):
                raise ValueError("wrong number of classes")
        return artifact, model
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError) as fault:
        raise Fault(f"{path} does not fit the network it names ({first_line(fault)})") from None
    finally:
        sys.path.remove(str(folder))


def load_model(path):
    """The network in a model.pt or dense.pt: a plain nn.Module in eval mode on the CPU, [0, 1] to logits."""
    return read_model(path)[1]


def build(artifact):
    """The network of a dense.pt."""
    model = build_network(**artifact["network"])
    model.load_state_dict(artifact["state"])
    return model


def load_pretrained(model, path, network, maker="common"):
    """Loads a dense.pt into `model`; UsageFault unless it holds that architecture, dense. maker is the script
    that builds it."""
    if not Path(path).is_file():
        raise UsageFault(f"argument --pretrained: there is no file {path}")
    artifact = read_model(path)[0]
    script, held = artifact["script"], artifact["network"]
    shapes = [{k: t.shape for k, t in state.items()} for state in (artifact["state"], model.state_dict())]
    if script != maker or held != network or shapes[0] != shapes[1]:
        raise UsageFault(f"argument --pretrained: {path} holds {held} of {script}.py, not a dense {network}")
    model.load_state_dict(artifact["state"])


# ---------------------------------------------------------------- the run

def progress(items, label, total):
    """Iterates over items; on a terminal, and only there, with a line of progress and the time to go."""
    begin, terminal = time.time(), sys.stderr.isatty()
    for i, item in enumerate(items):
        if terminal:
            rest = f" {(time.time() - begin) / i * (total - i):.0f} s to go" if i else ""
            print(f"\r{label}: {i + 1}/{total}{rest}\033[K", end="", file=sys.stderr, flush=True)
        yield item
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class Run:
    """One run's output folder: its log, its checkpoint and its result. Besides once(), epochs() is all that a
    script needs to be resumable: it yields the epochs still to do and saves after each. last.pt holds phase,
    epoch, the state of the objects named there, random states, and what once() computed."""
    active = False

    def __init__(self, args, data, script, argv):
        self.args, self.data, self.script = args, data, Path(script).stem
        size = f"r{args.ratio:g}" if "ratio" in args else f"b{args.bits}"
        args.output = args.output or (f"runs/{self.script}-{args.dataset}-{args.arch}w{args.width}"
                                      f"-{size}-s{args.seed}")
        self.folder = Path(args.output)
        if not self.script.isidentifier() or not Path(__file__).with_name(f"{self.script}.py").is_file():
            raise UsageFault(f"{script} must lie beside common.py, with only letters, digits and _ in its "
                             "name: model.pt is read back through it")
        self.command = shlex.join(["python", f"{self.script}.py", *(a for a in argv if a != "--resume")])
        elsewhere = ("output", "resume", "data_dir", "workers", "device")     # may differ when continued
        self.flags = {k: v for k, v in vars(args).items() if k not in elsewhere}
        self.result, self.saved, self.memo, self.seconds, self.phase = None, None, {}, {}, None
        finished, last = self.folder / "result.json", self.folder / "last.pt"
        if finished.is_file():
            try:
                self.result = json.loads(finished.read_text())
                flags, script = self.result["args"], self.result["script"]
            except (ValueError, KeyError, TypeError):
                raise Fault(f"{finished} is damaged; without it --resume judges the network again") from None
            self.check(flags, script, "finished; --resume prints its result")
            print(json.dumps(self.result, indent=1))
            return
        if last.is_file():
            self.saved = read_file(last, "script", "args", "phase", "epoch", "states", "memo", "seconds",
                                   "random", "log_size")
            evaluation = "eval_images", "eval_steps", "restarts", "eot", "certify_images", "certify_draws"
            judged = {k: self.flags[k] for k in evaluation if k in self.flags}            # so may these
            changed = {k: v for k, v in judged.items() if self.saved["args"].get(k) != v}
            before = self.saved["args"] | judged
            self.check(before, self.saved["script"], "not finished; --resume continues it")
            if (self.saved["random"]["cuda"] is None) != (args.device == "cpu"):
                raise UsageFault(f"argument --device: {self.folder} was not begun on {args.device}")
            self.memo, self.seconds = self.saved["memo"], self.saved["seconds"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / "log.jsonl", "a")
        with contextlib.suppress(ImportError):                   # no fcntl, no lock, on Windows
            import fcntl
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageFault(f"argument --output: another process is running in {self.folder}") from None
        self.file.truncate(self.saved["log_size"] if self.saved else 0)
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        Run.active = True
        if self.saved:
            print(f"continuing {self.folder} after epoch {self.saved['epoch']} of {self.saved['phase']}")
            if changed:
                self.log(note="continued with other flags of the evaluation", **changed)
        else:
            if args.resume:
                print(f"nothing to continue in {self.folder}, so this begins")
            self.log(script=self.script, **vars(args))

    def check(self, flags, script, state):
        """UsageFault unless the folder holds this very run and --resume was given."""
        then, now = flags | {"script": script}, self.flags | {"script": self.script}
        changed = ", ".join(k for k in now if then.get(k) != now[k])
        if changed:
            raise UsageFault(f"argument --output: {self.folder} holds a different run ({changed} differ)")
        if not self.args.resume:
            raise UsageFault(f"argument --output: {self.folder} holds this run, {state}")

    def log(self, **fields):
        """One line of key:value on stdout, and the same as JSON in log.jsonl."""
        if self.phase:
            fields = {"phase": self.phase, **fields, "seconds": round(time.time() - self.begin, 2)}
        shown = (f"{k}:{v:.5g}" if isinstance(v, float) else f"{k}:{v}" for k, v in fields.items())
        print(*shown, flush=True)
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()

    def once(self, name, compute):
        """The value of compute(), plain data: computed once in a run's life and kept in its checkpoints."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]

    def begun(self, phase):
        """Whether this continues a run stopped in `phase`, whose preparation is thus in the checkpoint."""
        return self.saved is not None and self.saved["phase"] == phase

    def epochs(self, phase, count, **stateful):
        """Yields a phase's epochs 0 .. count-1 that are still to do; saves after each what is `stateful`."""
        first = 0
        if self.saved and not self.begun(phase):                 # the run was stopped in a later phase
            return
        self.phase = phase
        if self.saved:
            try:
                for name, thing in stateful.items():
                    thing.load_state_dict(self.saved["states"][name])
            except (KeyError, ValueError, RuntimeError) as fault:
                raise Fault(f"{self.folder}/last.pt does not fit this run ({first_line(fault)})") from None
            self.generator.set_state(self.saved["random"]["batches"])
            torch.set_rng_state(self.saved["random"]["cpu"])
            if self.args.device != "cpu":
                torch.cuda.set_rng_state(self.saved["random"]["cuda"], self.args.device)
            first, self.saved = self.saved["epoch"], None
        else:
            self.save(0, stateful)
        for epoch in range(first, count):
            self.begin, self.label = time.time(), f"{phase} {epoch + 1}/{count}"
            yield epoch
            self.seconds[phase] = self.seconds.get(phase, 0) + time.time() - self.begin
            self.save(epoch + 1, stateful)
        self.phase = None

    def save(self, epoch, stateful):
        cuda = torch.cuda.get_rng_state(self.args.device) if self.args.device != "cpu" else None
        save_file(self.folder / "last.pt", dict(
            format=1, script=self.script, args=self.flags, phase=self.phase, epoch=epoch, memo=self.memo,
            states={name: thing.state_dict() for name, thing in stateful.items()}, seconds=self.seconds,
            random=dict(batches=self.generator.get_state(), cpu=torch.get_rng_state(), cuda=cuda),
            log_size=self.file.tell()))

    def batches(self):
        """The training batches of one epoch."""
        size = self.args.batch_size
        return progress(self.data.batches(size, self.generator), self.label, self.data.steps(size))

    def finish(self, judge=None, **more):
        """Reads dense.pt and model.pt back from disk, judges both (judge is evaluate's `more`), writes and
        returns result.json."""
        self.phase, self.begin, args, device = "final", time.time(), self.args, self.args.device
        attack = dict(epsilon=args.epsilon, step_size=args.step_size, num_steps=args.eval_steps,
                      seed=args.seed, eot=getattr(args, "eot", None) or 10)
        files = [self.folder / "dense.pt", self.folder / "model.pt"]
        (artifact, dense), (_, compact) = map(read_model, files)
        models = [m.to(device, memory_format=torch.channels_last) for m in (dense, compact)]
        judged = [evaluate(m, self.data.test, restarts=args.restarts, more=judge, **attack) for m in models]
        network, flags = artifact["network"], sanity_flags(compact, self.data.test, **attack)
        size, macs = [file.stat().st_size for file in files], [count_macs(m, network) for m in models]
        count = [sum(p.numel() for p in m.parameters()) for m in models]
        seconds = self.seconds | {"final": time.time() - self.begin}
        self.seconds = {k: round(v, 1) for k, v in seconds.items()}
        self.result = dict(
            script=self.script, command=self.command, args=self.flags,
            versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__),
            device="cpu" if device == "cpu" else torch.cuda.get_device_name(device),
            threads=torch.get_num_threads(), seconds=self.seconds, train_images=len(self.data.train[1]),
            **judged[1], flags=flags, dense=judged[0],
            params_ratio=round(count[0] / count[1], 3), parameters=count[1], dense_parameters=count[0],
            nonzeros=sum(int(p.count_nonzero()) for p in compact.parameters()),
            bytes_ratio=round(size[0] / size[1], 3), bytes=size[1], dense_bytes=size[0],
            macs_ratio=round(macs[0] / macs[1], 3), macs=macs[1], dense_macs=macs[0],
            latency_ms={f"batch_{b}": dict(zip(("dense", "compact"), latency(models, network, b, device)))
                        for b in (1, 128)},
            memory_bytes=peak_memory(),
            gpu_memory_bytes=None if device == "cpu" else torch.cuda.max_memory_allocated(device), **more)
        shown = ("clean_acc", "robust_acc", "verified_acc", "images", "params_ratio", "bytes_ratio", "bytes",
                 "dense_bytes", "macs_ratio")
        self.log(**{k: self.result[k] for k in shown if k in self.result},
                 dense_clean_acc=judged[0]["clean_acc"], dense_robust_acc=judged[0]["robust_acc"],
                 flags="; ".join(flags) or "none")
        temporary = self.folder / "result.json.tmp"
        temporary.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(temporary, self.folder / "result.json")
        Run.active = False
        return self.result


# ---------------------------------------------------------------- python common.py evaluate | compare | bench

def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("evaluate", description="Judges a saved network.")
    p.add_argument("model", help="a model.pt or dense.pt")
    p.add_argument("--dataset", help="default: the one it was made for, and so for the attack")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--workers", type=whole(1, 256), default=8, help="threads that decode class folders")
    p.add_argument("--eval-images", type=whole(0), help="balanced subset; 0 is all (default: 1000 on a CPU)")
    p.add_argument("--epsilon", type=radius)
    p.add_argument("--step-size", type=radius)
    p.add_argument("--eval-steps", type=whole(1, 10000))
    p.add_argument("--restarts", type=whole(1, 1000))
    p.add_argument("--eot", type=whole(1, 1000), help="passes a gradient, of a random network (default: 10)")
    p.add_argument("--loss", choices=LOSSES, default="ce", help="margin is Carlini and Wagner's in l_inf")
    p.add_argument("--source", help="another saved network, whose PGD examples are tried too")
    p.add_argument("--autoattack", action="store_true", help="needs the package pyautoattack")
    p.add_argument("--seed", type=whole(0), default=0)
    p.add_argument("--device", default="auto")
    p = commands.add_parser("compare", description="Prints one Markdown table over finished runs.")
    p.add_argument("folders", nargs="+", help="with a result.json; those differing by seed alone share a row")
    p.add_argument("--plot", help="file for a picture of robust accuracy against bytes; needs matplotlib")
    p = commands.add_parser("bench", description="Times training steps, in turn, on random images.")
    p.add_argument("--arch", choices=NETWORKS, default="resnet18")
    p.add_argument("--width", type=whole(1, 64), default=16)
    p.add_argument("--batch-size", type=whole(2, 65536), default=128)
    p.add_argument("--num-steps", type=whole(0, 10000), default=10, help="PGD steps")
    p.add_argument("--rounds", type=whole(1, 1000), default=5, help="of which medians are taken")
    p.add_argument("--amp", choices=("auto", "on", "off"), default="auto")
    p.add_argument("--compile", action="store_true", help="time the compiled step too")
    p.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    return dict(evaluate=evaluate_command, compare=compare_command, bench=bench_command)[args.command](args)


def evaluate_command(args):
    """Judges args.model and prints what result.json would say of it."""
    artifact, model = read_model(args.model)
    for key, value in artifact["judged"].items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    args.device = check_device(args.device)
    if args.autoattack and not importlib.util.find_spec("pyautoattack"):
        raise UsageFault("argument --autoattack: the package pyautoattack is not installed")
    data, network = load_data(args), artifact["network"]
    here = dict(channels=data.test[0].shape[1], classes=len(data.classes), size=list(data.test[0].shape[2:]))
    if here != {k: network[k] for k in here}:
        raise UsageFault(f"argument --dataset: {args.dataset} has {here}, the network was made for {network}")
    if args.source:
        other, source = read_model(args.source)
        if here != {k: other["network"][k] for k in here}:
            raise UsageFault(f"argument --source: {args.source} is for {other['network']}, not {here}")
        source.to(args.device, memory_format=torch.channels_last)
    model.to(args.device, memory_format=torch.channels_last)
    attack = dict(epsilon=args.epsilon, step_size=args.step_size, num_steps=args.eval_steps, seed=args.seed,
                  eot=args.eot or 10)
    result = dict(model=args.model, script=artifact["script"], dataset=args.dataset,
                  bytes=os.path.getsize(args.model),
                  **evaluate(model, data.test, restarts=args.restarts, loss=args.loss, **attack),
                  flags=sanity_flags(model, data.test, **attack))
    if args.source:
        result["transfer_acc"] = transfer(model, source, data.test, **attack)
        if result["robust_acc"] - result["transfer_acc"] > max(2, 300 / result["images"]):
            result["flags"].append("transfer is stronger than PGD")
    if args.autoattack:
        accuracy, version = autoattack(model, data.test, epsilon=args.epsilon, seed=args.seed)
        result |= dict(autoattack_acc=accuracy, autoattack_ci=interval(accuracy, result["images"]),
                       autoattack_version=version)
    print(json.dumps(result, indent=1))
    return result


def read_run(folder):
    """A finished run: its result.json and, where kept beside it, what `evaluate --autoattack` printed."""
    run = json.loads((Path(folder) / "result.json").read_text()) | {"folder": folder}
    run["nonzeros_ratio"] = run["dense_parameters"] / run["nonzeros"]
    kept = Path(folder) / "evaluate-autoattack.json"
    with contextlib.suppress(FileNotFoundError):
        try:
            judged = json.loads(kept.read_text())
            if any(judged[k] != run[k] for k in ("script", "bytes")) or judged["dataset"] != run["args"][
                    "dataset"] or judged["attack"]["epsilon"] != run["attack"]["epsilon"]:
                raise ValueError("it is of another file, data set or radius")
            low, high = judged["autoattack_ci"]
            run["autoattack"] = (f"{judged['autoattack_acc']:.1f}, {low} to {high}; PGD "
                                 f"{judged['robust_acc']:.1f}; {judged['images']:,} images")
        except (ValueError, KeyError, TypeError) as fault:
            print(f"left out: {kept} ({first_line(fault)})", file=sys.stderr)
    return run


def same_but_seed(folders):
    """{settings as JSON: runs} of the finished runs in `folders`; one that differs in its seed alone stands
    with the others. Faults where a seed is there twice, or nothing is."""
    def show(value):                                              # 16 and 16.0 are one ratio
        return f"{value:g}" if isinstance(value, float) else str(value)

    rows = {}
    for folder in folders:
        try:
            run = read_run(folder)
            run["latency_ms"]["batch_1"], run["latency_ms"]["batch_128"]             # older files lack one
            same = {k: show(v) for k, v in run["args"].items()
                    if k not in ("seed", "pretrained", "ticket")}
            rows.setdefault(json.dumps(same | {"script": run["script"]}, sort_keys=True), []).append(run)
        except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as fault:
            print(f"left out: {folder} holds no readable result.json ({fault})", file=sys.stderr)
    if not rows:
        raise Fault("none of these folders holds a finished run")
    for runs in rows.values():
        if len({run["args"]["seed"] for run in runs}) < len(runs):
            raise Fault(f"one run twice, or two of one seed: {' '.join(run['folder'] for run in runs)}")
    return rows


def compare_command(args):
    """Prints a row for each set of runs that differ in the seed alone: means, and the range of several."""
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise UsageFault(f"argument --plot: {args.plot} does not end in .png, .pdf or .svg")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UsageFault("argument --plot: matplotlib is not installed")
    rows = same_but_seed(args.folders)
    sets = [json.loads(row) for row in rows]
    told = {k for k in {k for same in sets for k in same} if len({s[k] for s in sets if k in s}) > 1}
    told = sorted((told | {"dataset", "arch", "width", "ratio", "bits"}) - {"script"})

    def mean(runs, *path, digits=1):
        values = [functools.reduce(lambda value, key: value[key], path, run) for run in runs]
        middle, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.mean, min, max))
        return middle if low == high else f"{middle} ({low} to {high})"

    def both(runs, batch):
        return ", ".join(mean(runs, "latency_ms", batch, which) for which in ("compact", "dense"))

    heads = ["run", "dense clean, robust %", "clean %", "robust %", "95 % interval", "bytes", "bytes x",
             "nonzeros x", "MACs x", "batch 1 ms, dense", "batch 128 ms, dense", "flags", "folder",
             "command (of the first)"]
    more = {"verified_acc": "verified %", "autoattack": "AutoAttack %, interval; PGD there",
            "fgsm_acc": "FGSM %", "ifgsm_acc": "I-FGSM %", "margin_acc": "margin loss %",
            "sparsity": "zeros %", "channel_sparsity": "dead channels %"}
    sparse = "verified_acc", "autoattack"                              # a column that some rows leave empty
    more = {k: head for k, head in more.items() if (any if k in sparse else all)(
        k in run for runs in rows.values() for run in runs)}
    heads[5:5] = more.values()
    heads[1] = "dense clean, robust, verified %" if "verified_acc" in more else heads[1]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for same, runs in zip(sets, rows.values()):
        cells = [" ".join([same["script"], *(f"{k}={same[k]}" for k in told if k in same)]),
                 ", ".join(mean(runs, "dense", k) for k in ("clean_acc", "robust_acc", "verified_acc")
                           if all(k in run["dense"] for run in runs)),
                 mean(runs, "clean_acc"), mean(runs, "robust_acc"),
                 "{} to {}".format(*runs[0]["robust_ci"]) if len(runs) == 1 else f"{len(runs)} seeds",
                 mean(runs, "bytes", digits=0), mean(runs, "bytes_ratio"), mean(runs, "nonzeros_ratio"),
                 mean(runs, "macs_ratio"), both(runs, "batch_1"), both(runs, "batch_128"),
                 "; ".join(sorted({flag for run in runs for flag in run["flags"]})) or "none",
                 " ".join(run["folder"] for run in runs), f"`{runs[0]['command']}`"]
        attacked = [(f"seed {run['args']['seed']}: " if len(runs) > 1 else "") + run["autoattack"]
                    for run in runs if "autoattack" in run]
        cells[5:5] = ["; ".join(attacked) if k == "autoattack" else
                      mean(runs, k) if all(k in run for run in runs) else "" for k in more]
        print("| " + " | ".join(cells) + " |")
    if args.plot:
        draw([run for runs in rows.values() for run in runs], args.plot)
    return list(rows.values())


def draw(runs, path):
    """A picture of robust accuracy and its interval against bytes; needs matplotlib."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5)).subplots()
    for script in sorted({run["script"] for run in runs}):
        mine = [run for run in runs if run["script"] == script]
        x, y = [run["bytes"] for run in mine], [run["robust_acc"] for run in mine]
        bars = [[abs(run["robust_ci"][i] - run["robust_acc"]) for run in mine] for i in (0, 1)]
        axes.errorbar(x, y, bars, fmt="o", capsize=2, elinewidth=0.5, label=script)
        for run in mine:
            axes.annotate(Path(run["folder"]).name, (run["bytes"], run["robust_acc"]), fontsize=7,
                          xytext=(3, 3), textcoords="offset points")
    dense = sorted({(run["dense_bytes"], run["dense"]["robust_acc"]) for run in runs})
    axes.plot(*zip(*dense), "kx", label="dense, before compression")
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="robust accuracy, % (95 % interval)")
    axes.legend()
    axes.figure.savefig(path, dpi=120, bbox_inches="tight")


def naive_step(model, optimizer, x, y, epsilon, step_size, num_steps):
    """Adversarial training as it is often written: float32, train mode throughout, and gradients of all
    weights in every step of the attack."""
    model.train()
    x_adv = (x + epsilon * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(num_steps):
        x_adv.requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = x_adv.clamp(x - epsilon, x + epsilon).clamp(0, 1)
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    optimizer.step()


def bench_steps(args, device):
    """The functions to be timed, {name: one training step}; {paper: (name of the step without it, its update
    or None)}; whether they use bfloat16."""
    import admm_prune
    import binary_relax
    import cstar
    import hydra_prune
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pair = images.to(device), torch.randint(0, 10, (args.batch_size,), generator=generator).to(device)
    data, batch = Data(pair, pair, list("0123456789")), (to_float(pair[0]), pair[1])
    flags = [f"--{k.replace('_', '-')}={getattr(args, k)}" for k in
             ("arch", "width", "batch_size", "num_steps", "amp")] + [f"--device={device}"]

    def step_of(script, with_method=lambda model: {}, *more):
        """One step of a script's training, on a network of its own."""
        settings = script.get_args([*flags, *more])
        torch.manual_seed(0)
        model = prepare(build_network(args.arch, args.width, 3, 10, (32, 32)), settings)
        extra = with_method(model)
        optimizer, schedule = sgd(extra.pop("trained", model), 1e-4, 10**6, data, settings)
        return lambda: script.train_epoch(model, [batch], optimizer, schedule, settings, **extra)

    def factors(model):
        layers = cstar.factorisable(model)
        weights = {name: m.weight.detach().cpu() for name, m in layers.items()}
        ranks = cstar.choose_ranks(weights, cstar.parameter_budget(model, 8), "hull")
        admm = cstar.ADMM(layers, ranks, 0.1)
        papers["cstar"] = "default", admm.update
        return dict(penalty=admm.penalty)

    def filters(model):
        def choose(weights):
            return admm_prune.choose_masks(weights, "filter", 4)
        admm = admm_prune.ADMM(admm_prune.prunable(model), choose, 0.1)
        papers["admm_prune"] = "default", admm.update
        return dict(penalty=admm.penalty)

    def scores(model):
        found = hydra_prune.Scores(model, "irregular", 10).to(device)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        return dict(scores=found, trained=nn.ModuleList([found, *norms]))

    def quantised(model):
        return dict(weights=list(binary_relax.quantisable(model).values()), lam=2.0)

    papers = {"hydra_prune": ("hydra_prune without", None), "binary_relax": ("binary_relax without", None)}
    torch.manual_seed(0)
    plain, settings = build_network(args.arch, args.width, 3, 10, (32, 32)).to(device), cstar.get_args(flags)
    optimizer = torch.optim.SGD(plain.parameters(), 1e-4, 0.9)
    inputs = batch[0].contiguous(), batch[1], settings.epsilon, settings.step_size, settings.num_steps
    steps = {"naive": lambda: naive_step(plain, optimizer, *inputs), "default": step_of(cstar)}
    if args.compile:
        steps["compiled"] = step_of(cstar, lambda model: {}, "--compile")
    with contextlib.suppress(UsageFault):                            # too narrow for that ratio
        steps["cstar"] = step_of(cstar, factors)
    return steps | {"admm_prune": step_of(admm_prune, filters), "hydra_prune without": step_of(hydra_prune),
                    "hydra_prune": step_of(hydra_prune, scores),
                    "binary_relax without": step_of(binary_relax),
                    "binary_relax": step_of(binary_relax, quantised)}, papers, settings.amp


def saved_for_backward(model, x):
    """Bytes that a forward pass over x keeps for the backward pass, parameters not counted (but autocast's
    copies of them are)."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def limits(args, step, bfloat16, device):
    """What the hardware allows: GFLOP/s of products of matrices (n, n), GFLOP of a training step, as it must
    be and in naive form, how much faster the former is at those rates, bytes that a forward pass saves for
    the backward one, and where `step` spends its time."""
    n, rates, precision = 2048 if device == "cpu" else 16384, {}, torch.get_float32_matmul_precision()
    tf32 = device != "cpu" and torch.backends.cudnn.allow_tf32       # as in the naive step's convolutions
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    for kind in ("float32", "bfloat16"):
        a, b = torch.rand(2, n, n, device=device).to(getattr(torch, kind))
        rates[kind] = round(2e-9 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5)))
    torch.set_float32_matmul_precision(precision)
    model = build_network(args.arch, args.width, 3, 10, (32, 32)).to(device)
    forward = 2e-9 * args.batch_size * count_macs(model, dict(channels=3, size=(32, 32)))
    work = dict(naive=3 * forward * (args.num_steps + 1), default=forward * (2 * args.num_steps + 3))
    x = torch.rand(args.batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bfloat16):
        kept = saved_for_backward(model.train(), x)
    with torch.profiler.profile() as profile:
        step()
    kind, clock = ("CPU", "self_cpu_time_total") if device == "cpu" else ("CUDA", "self_device_time_total")
    found = sorted(((getattr(e, clock), e.key) for e in profile.key_averages()
                    if e.device_type.name == kind and not e.is_user_annotation), reverse=True)
    total = sum(spent for spent, _ in found)
    rate = rates["bfloat16" if bfloat16 else "float32"]
    bound = work["naive"] / rates["float32"] / (work["default"] / rate)
    return dict(matrix_gflop_per_second=rates, gflop_a_step={k: float(f"{v:.4g}") for k, v in work.items()},
                times_naive_at_these_rates=round(bound, 2), saved_for_backward_bytes=kept,
                profile_per_cent={key: round(100 * spent / total, 1) for spent, key in found[:8]})


def bench_inference(args, device):
    """Milliseconds a forward pass, without training (random weights), of the dense network, of CSTAR's at
    ratio 16 by both rank rules, and of one with a quarter of the filters, near ratio 16, where the width
    allows these; batch norm as it is, and folded."""
    import cstar
    from torch.fx.experimental.optimization import fuse
    torch.manual_seed(0)
    network = dict(channels=3, size=(32, 32))
    dense = build_network(args.arch, args.width, 3, 10, (32, 32)).eval()
    models, weights = dict(dense=dense), {n: m.weight.detach() for n, m in cstar.factorisable(dense).items()}
    with contextlib.suppress(UsageFault):
        budget = cstar.parameter_budget(dense, 16)
        for rule in ("hull", "uniform"):
            ranks = cstar.choose_ranks(weights, budget, rule)
            models[f"cstar {rule}"] = cstar.factorise(copy.deepcopy(dense), ranks).eval()
    if args.width % 4 == 0:
        models["filters"] = build_network(args.arch, args.width // 4, 3, 10, (32, 32)).eval()
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    macs = {name: count_macs(m, network) for name, m in models.items()}
    models |= {f"{name}, folded": fuse(m) for name, m in models.items()}
    for model in models.values():
        model.to(device, memory_format=torch.channels_last)
    return dict(params_ratio={name: round(sizes["dense"] / n, 1) for name, n in sizes.items()},
                macs_ratio={name: round(macs["dense"] / n, 1) for name, n in macs.items()},
                **{f"batch_{batch}_ms": dict(zip(models, latency(models.values(), network, batch, device)))
                   for batch in (1, 128)})


def bench_command(args):
    """Times one training step in its naive form, as the scripts have it and, with --compile, compiled; and
    with what each paper adds. All take turns; printed are medians over the rounds, of times and of ratios,
    beside what the hardware allows; and what compact networks gain in inference."""
    device = check_device(args.device)
    steps, papers, bfloat16 = bench_steps(args, device)
    times, memory = {name: [] for name in steps}, {}
    for turn in range(args.rounds + 1):                              # the first warms up, and compiles
        for name, step in progress(list(steps.items()), f"round {turn}/{args.rounds}", len(steps)):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            times[name].append(seconds_of(step, device))
            memory[name] = None if device == "cpu" else torch.cuda.max_memory_allocated(device) - before
    times = {name: t[1:] for name, t in times.items()}

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(times[a], times[b]))

    result = dict(arch=args.arch, width=args.width, batch_size=args.batch_size, num_steps=args.num_steps,
                  device="cpu" if device == "cpu" else torch.cuda.get_device_name(device),
                  threads=torch.get_num_threads(), torch=torch.__version__, rounds=args.rounds,
                  bfloat16_but_in_naive=bfloat16, steps={}, added_per_cent={},
                  tf32_in_naive=device != "cpu" and torch.backends.cudnn.allow_tf32)
    for name, t in times.items():
        middle = statistics.median(t)
        result["steps"][name] = dict(
            seconds=round(middle, 4), images_per_second=round(args.batch_size / middle, 1),
            times_naive=round(ratio("naive", name), 2), gpu_bytes_above_resident=memory[name])
    per_epoch = 50000 / args.batch_size
    for name, (without, update) in papers.items():
        result["added_per_cent"][name] = added = {"a step": round(100 * (ratio(name, without) - 1), 1)}
        if update:
            took = statistics.median(seconds_of(update, device) for _ in range(3))
            added |= {"update_seconds": round(took, 3), "an update each 50,000 images": round(
                100 * took / per_epoch / statistics.median(times[without]), 2)}
    result |= dict(hardware=limits(args, steps["default"], bfloat16, device),
                   inference=bench_inference(args, device), memory_bytes=peak_memory())
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    import common                       # one module, not two: scripts that are imported raise common's faults
    common.cli(common.main)
