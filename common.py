"""What the four scripts share. They import this file, which imports a script only to rebuild a network that
it saved, and is never run. A network maps images in [0, 1], (N, C, H, W), to logits.

From top to bottom: faults and flags, several processes, data (load_data), networks (build_network), smaller
networks, training, the attack (pgd), evaluation (evaluate, sanity_flags), files (load_model), the run (Run).
"""
import argparse
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
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = "STRICT"              # ARM CPUs may be told to round float32

# Default flags by data set; compress_epochs: --admm-, --prune- or --relax-epochs. Radius, step and number of
# steps of MNIST and CIFAR are the papers', the rest is ours.
CIFAR = dict(arch="resnet18", width=16, pretrain_epochs=40, compress_epochs=20, finetune_epochs=20,
             batch_size=256, lr=0.2, momentum=0.9, weight_decay=5e-4, epsilon=8 / 255, step_size=2 / 255,
             num_steps=10, ramp_epochs=0)
RECIPES = {
    "digits": CIFAR | dict(width=4, batch_size=64, lr=0.1, epsilon=0.2, step_size=0.05, pretrain_epochs=15,
                           compress_epochs=6, finetune_epochs=10),
    "mnist": CIFAR | dict(arch="lenet", width=4, batch_size=128, lr=0.05, epsilon=0.3, step_size=0.01,
                          num_steps=40, ramp_epochs=10),
    "cifar10": CIFAR, "cifar100": CIFAR, "svhn": CIFAR | dict(lr=0.1),
    "imagenet": CIFAR | dict(arch="imagenet_resnet18", lr=0.1, weight_decay=1e-4, epsilon=4 / 255,
                             num_steps=3)}
FORMAT = 2                                                       # of all files; raised when these change
PHOTO = 224                                                      # networks get photos of 224 x 224 pixels
CLEAR = "\r\033[K"                                               # wipes progress()'s line off the terminal
LAUNCHER = ["python"] if not dist.is_torchelastic_launched() else [
    "torchrun", f"--nproc_per_node={os.environ['WORLD_SIZE']}"]


# ---------------------------------------------------------------- faults and flags
class Fault(Exception):
    """A run-time fault: one sentence for the user, exit status 1, or `status`."""


class UsageFault(Fault):
    """A wrong flag, or flags that contradict each other or the data: one line, status 2, nothing written."""
    status = 2


def check_finite(what, *tensors):
    """Fault unless all their values are finite; what: their name in the message."""
    if not all(t.isfinite().all() for t in tensors):
        raise Fault(f"{what} is not finite: training has diverged (try a lower rate, or --amp off)")


def first_line(fault):
    """The message's first line, or the error's type; without the position in a C++ file that torch prints."""
    text = str(fault).strip().replace(":\n\t", ": ", 1)           # load_state_dict gives reasons in line 2
    text = re.sub(r"^(.*\.cpp:\d+, |\[[^]]*\.cc:\d+\][ .]*)", "", text.partition("\n")[0])
    return text[:300] or type(fault).__name__


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line."""
    def __init__(self, description, **more):
        super().__init__(description=(description or "").strip().partition("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message):
        raise UsageFault(message)

    def refuse(self, args, reason, *flags):
        """Exits with one line if one of these flags, None by default, was given: it would do nothing."""
        for flag in flags:
            if getattr(args, flag) is not None:
                self.error(f"argument --{flag.replace('_', '-')}: does nothing {reason}")


def number(low, high=10**9, kind=float, hint=""):
    """An argparse type: a finite float (8/255 counts as one) or an int, in [low, high]."""
    name = "number" if kind is float else "whole number"
    def convert(text):
        with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
            value = float(Fraction(text)) if kind is float and "/" in text else kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low} to {high}{hint}")
    return convert


whole = functools.partial(number, kind=int)
radius = number(0, 1, hint=" (pixels are in [0, 1]: write 8/255, not 8)")
rate = number(1e-8, 10)


def script_parser(doc, script, phase, networks=(), adapt=lambda recipe: {}):
    """A script's parser, with the flags that all four share. phase: its flag for compress_epochs; networks:
    values of --arch that it alone knows; adapt(recipe): its changes to one of RECIPES."""
    parser = Parser(doc, prog=Path(script).name)
    parser.recipes, parser.epilog = {}, "defaults of each data set:"
    for name, recipe in RECIPES.items():
        flags = {phase if k == "compress_epochs" else k: v for k, v in (recipe | adapt(recipe)).items()}
        parser.recipes[name] = flags
        parser.epilog += f"\n  {name}:"
        for k, v in flags.items():
            parser.epilog += f" --{k.replace('_', '-')} {v if isinstance(v, str) else f'{v:.5g}'}"
    run = parser.add_argument_group("run")
    run.add_argument("--dataset", default="cifar10", help=f"{', '.join(RECIPES)} or a folder")
    run.add_argument("--data-dir", default="data", help="where data sets are looked for and downloaded to")
    run.add_argument("--workers", type=whole(1, 256), default=min(8, os.cpu_count() or 1),
                     help="threads that decode images; for photos, processes (a fast GPU wants all cores)")
    run.add_argument("--train-images", type=whole(0), default=0, help="balanced subset to train on; 0 is all")
    run.add_argument("--arch", choices=(*networks, *NETWORKS))
    run.add_argument("--width", type=whole(1, 64), help="16 is the standard network")
    run.add_argument("--seed", type=whole(0), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    run.add_argument("--output", help="the run's folder (default: runs/ and a name made of the flags)")
    run.add_argument("--resume", action="store_true", help="continue the run in --output")
    run.add_argument("--pretrained", help="a dense.pt or published state dict; skips pre-training")
    run.add_argument("--mean", type=number(0, 1), nargs="+", help="put (x - mean) / std into the network")
    run.add_argument("--std", type=number(1e-3, 10), nargs="+", help="with --mean, one number a channel")
    train = parser.add_argument_group("training")
    train.add_argument("--pretrain-epochs", type=whole(0, 10000))
    train.add_argument("--finetune-epochs", type=whole(0, 10000))
    train.add_argument("--batch-size", type=whole(2, 65536))
    train.add_argument("--lr", type=rate, help="peak rate of pre-training (lenet and cnn_*: 0.05 "
                       "where others have 0.2)")
    train.add_argument("--momentum", type=number(0, 0.999))
    train.add_argument("--weight-decay", type=number(0, 1))
    train.add_argument("--amp", choices=("auto", "on", "off"), default="auto",
                       help="bfloat16 in training; off: float32, on a GPU with TF32 convolutions")
    train.add_argument("--compile", action="store_true", help="torch.compile the network in training")
    attack = parser.add_argument_group("attack (l_inf; pixels are in [0, 1])")
    attack.add_argument("--epsilon", type=radius, help="radius, such as 8/255; the default step follows it")
    attack.add_argument("--step-size", type=radius)
    attack.add_argument("--num-steps", type=whole(0, 10000), help="PGD steps in training")
    attack.add_argument("--ramp-epochs", type=whole(0, 10000), help="first epochs, in which the radius grows")
    test = parser.add_argument_group("evaluation")
    test.add_argument("--eval-images", type=whole(0), help="as --train-images (default: 1000 on a CPU)")
    test.add_argument("--eval-steps", type=whole(1, 10000), default=50, help="default: 50; with noise 20")
    test.add_argument("--eval-step-size", type=radius, help="of the first step (default: epsilon)")
    test.add_argument("--restarts", type=whole(1, 1000), default=4, help="losses in turn (default: 4)")
    return parser


def resolve(parser, args, longest_ramp=lambda args: args.pretrain_epochs, **defaults):
    """Fills in flags not given, from `defaults` or else the recipe; refuses contradictions; seeds torch.
    longest_ramp(args): the epochs that --ramp-epochs may fill."""
    if args.dataset not in RECIPES and args.epsilon is None:
        parser.error(f"argument --dataset: {args.dataset}, none of {', '.join(RECIPES)}, needs --epsilon")
    if "" in (args.pretrained, args.output):                         # an unset variable of a shell
        parser.error("argument --pretrained or --output: names no file or folder")
    if args.pretrained and args.pretrain_epochs:
        parser.error("argument --pretrain-epochs: not with --pretrained, which skips that phase")
    args.pretrain_epochs = 0 if args.pretrained else args.pretrain_epochs
    recipe = dict(parser.recipes.get(args.dataset, parser.recipes["cifar10"]))
    if args.epsilon is not None:                                     # a new radius scales the step too
        recipe["step_size"] = min(1.0, recipe["step_size"] * (args.epsilon / recipe["epsilon"]))
    if args.arch in ("lenet", "cnn_small", "cnn_large") and recipe["lr"] == CIFAR["lr"]:
        recipe["lr"] /= 4                        # without batch norm: see results/lenet-rates.txt
    ramp_given = args.ramp_epochs or 0
    for name, value in (recipe | defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if ramp_given > (longest := longest_ramp(args)):
        parser.error(f"argument --ramp-epochs: {ramp_given} is more than the {longest} epochs it can fill")
    args.ramp_epochs = min(args.ramp_epochs, longest)
    args.eval_step_size = args.epsilon if args.eval_step_size is None else args.eval_step_size
    args.device = check_device(args.device)
    if args.batch_size % world() or args.batch_size < 2 * world():
        parser.error(f"argument --batch-size: {args.batch_size} is not {world()} equal shares of 2 or more")
    compiler = os.environ.get("CXX", {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"))
    if args.compile and not shutil.which(compiler):
        parser.error(f"argument --compile: torch.compile needs a C++ compiler, and there is no {compiler}")
    if args.amp == "on" and args.device != "cpu" and not bfloat16_is_fast(args.device):
        parser.error("argument --amp: on is not for this GPU, which has no bfloat16")
    args.amp = args.amp == "on" or args.amp == "auto" and bfloat16_is_fast(args.device)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)       # CPUs are slow at numbers below 1e-38; set before torch has threads
    return args


def check_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:1' -> 'cpu' or 'cuda:N'; UsageFault if that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [*(f"cuda:{i}" for i in range(count)), "cpu"]
    if name == "auto" or name == "cuda" and count:                   # of several processes, each has its own
        name = f"cuda:{os.environ['LOCAL_RANK']}" if world() > 1 and count else here[0]
    elif world() > 1 and ":" in name:
        here = ["cuda", "cpu"]
    if name not in here:
        raise UsageFault(f"argument --device: {name} is none of this machine's {', '.join(here)}")
    if name != "cpu":
        torch.cuda.set_device(name)                                  # else helpers of torch would use cuda:0
    return name


def progress(items, label, total, later=0):
    """Iterates over items; a terminal shows progress and the time left for them and `later` more."""
    begin, terminal = time.time(), sys.stderr.isatty() and rank() == 0
    for i, item in enumerate(items):
        if terminal:
            rest = timedelta(seconds=int((time.time() - begin) / max(1, i) * (total + later - i)))
            to_go = f", {rest} to go" if i else ""
            print(f"{CLEAR}{label}: {i + 1}/{total}{to_go}", end="", file=sys.stderr, flush=True)
        yield item
    print(CLEAR if terminal else "", end="", file=sys.stderr, flush=True)


def cli(main):
    """Runs main(); a fault becomes one line and a status; a signal stops at once and says how to continue."""
    if dist.is_torchelastic_launched():
        join()                                                       # first: it blocks signal handlers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = message = None
    try:
        try:
            main()
            sys.stdout.flush()
        finally:                                                     # torchrun stops the rest once one ends
            if dist.is_initialized():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except BrokenPipeError:                                          # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (Fault, OSError) as fault:
        status, where = getattr(fault, "status", 1), Run.active.where if Run.active else ""
        message = f"{where}{fault}"
    except (KeyboardInterrupt, SystemExit) as stop:
        status = getattr(stop, "code", 130)                          # 130: Ctrl-C
        if status in (130, 143):
            message = "stopped"
            if Run.active:
                command = shlex.join([*LAUNCHER, *(a for a in sys.argv if a != "--resume"), "--resume"])
                message += f"; the last finished epoch is kept. To continue: {command}"
    except Exception as fault:
        status, words = 1, ("out of memory|not enough memory|allocate memory|ALLOC_FAILED|find an engine|"
                            "worker .*(Killed|Bus)")
        if isinstance(fault, MemoryError) or isinstance(fault, RuntimeError) and re.search(words, str(fault)):
            message = (f"out of memory ({first_line(fault)}); smaller --batch-size, --width, --eval-images, "
                       "--workers may help")
        elif dist.is_initialized():                                  # a bug: printed, then ended as below
            traceback.print_exc()
        else:
            raise
    if message and (not dist.is_initialized() or join().add("messages", 1) == 1):        # one prints it
        print(f"{CLEAR if sys.stderr.isatty() else ''}{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status or 0)                            # a tidy end could wait for processes that are gone
    sys.exit(status)


# ---------------------------------------------------------------- several processes, under torchrun
# All run the same code and draw the same batches; each trains on its own share of a batch, with its own
# noise, and rank 0 alone writes files.
@functools.cache
def join():
    """Connects the processes that torchrun started; returns their common key-value store."""
    store, index, count = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store,
                            rank=index, world_size=count, timeout=timedelta(days=1))     # for rank 0's work
    sys.stdout = open(os.devnull, "w") if index else sys.stdout
    return store


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def sync(collective, *args):
    """collective(*args), one of torch's, if there are several processes; Fault if one is gone."""
    try:
        if world() > 1:
            collective(*args)
    except (torch.AcceleratorError, torch.OutOfMemoryError):         # this process's own
        raise
    except RuntimeError as fault:                                    # gloo has no error of its own for this
        reason = first_line(str(fault).rpartition("Last error:")[2])                 # NCCL's last line tells
        raise Fault(f"another process is out of reach ({reason.partition('. ')[0]})") from None


def average_(tensors):
    """Replaces each tensor by its mean over all processes in one message."""
    if world() > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        sync(dist.all_reduce, flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t) / world())


def by_rank_0(compute):
    """The plain data that compute() returns: rank 0 alone calls it and passes it to the others."""
    found = [compute() if rank() == 0 else None]
    sync(dist.broadcast_object_list, found)
    return found[0]


# ---------------------------------------------------------------- data
TORCHVISION = {"mnist": ("MNIST", "MNIST/raw"), "cifar10": ("CIFAR10", "cifar-10-batches-py"),
               "cifar100": ("CIFAR100", "cifar-100-python"), "svhn": ("SVHN", "train_32x32.mat")}
AUGMENTATION = {"svhn": dict(crop=4), "cifar10": dict(crop=4, flip=True), "cifar100": dict(crop=4, flip=True)}


class Data:
    """Training and test set, each (uint8 images (N, C, H, W), labels (N,)) on the device, and class names.
    Training batches are cropped (after zero padding by `crop`) and flipped there; Photos does that itself."""
    def __init__(self, train, test, classes, crop=0, flip=False):
        self.train, self.test, self.classes, self.crop, self.flip = train, test, classes, crop, flip

    def steps(self, batch_size):
        """Batches in an epoch, all full (or one of all images); the epoch leaves out the images beyond."""
        return max(1, len(self.train[1]) // batch_size)

    def batches(self, batch_size, generator):
        """Yields (x float (B, C, H, W) in [0, 1], y (B,)), one epoch in an order drawn from `generator`."""
        (images, labels), size = self.train, min(batch_size, len(self.train[1]))
        order = torch.randperm(len(labels), generator=generator, device=labels.device)
        batches = order[:self.steps(size) * size].split(size)
        own = slice(rank(), size // world() * world(), world())      # this process's share of a batch
        shares = [index[own] for index in batches]
        if isinstance(images, Photos):
            seed = torch.randint(2**60, (), generator=generator, device=labels.device).item()
            crops = images.load(shares, labels.device, seed)
        else:
            crops = (augment(images[index], self.crop, self.flip, generator)[own] for index in batches)
        for x, index in zip(crops, shares):
            yield to_float(x), labels[index]


class Photos:
    """Image files of any size, treated like uint8 (N, 3, PHOTO, PHOTO) but decoded only when needed."""
    def __init__(self, files, workers):
        self.files, self.workers, self.shape = files, workers, (len(files), 3, PHOTO, PHOTO)

    def decode(self, indices, crop, seed):
        """Returns photos, uint8 (B, 3, PHOTO, PHOTO), cropped by seed and index alone, or a Fault."""
        images = []
        for i in indices:
            try:
                image = torch.from_numpy(read_image(self.files[i])[0]).permute(2, 0, 1)
            except Fault as fault:               # raised in a worker, it would have a traceback
                return fault
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {i}".encode()))
            images.append(crop(image))
        return torch.stack(images)

    def load(self, batches, device, seed=None):
        """Yields photos for each batch of indices (B,), cropped randomly or, without seed, centrally."""
        from torchvision.transforms import v2
        central = [v2.Resize(PHOTO * 256 // 224), v2.CenterCrop(PHOTO)]
        random = [v2.RandomResizedCrop(PHOTO), v2.RandomHorizontalFlip()]
        crop = v2.Compose(central if seed is None else random)
        warnings.filterwarnings("ignore", "This DataLoader will create")         # more processes than cores
        loader = torch.utils.data.DataLoader(                        # its items are whole batches
            [index.tolist() for index in batches], batch_size=None, num_workers=self.workers,
            collate_fn=functools.partial(self.decode, crop=crop, seed=seed), pin_memory=str(device) != "cpu",
            multiprocessing_context="fork" if sys.platform == "linux" else None)         # others take seconds
        for images in loader:
            if isinstance(images, Fault):
                raise images
            yield images.to(device, non_blocking=True)


def to_float(images):
    """uint8 -> float in [0, 1], channels last in memory, the convolutions' fast layout."""
    return images.float().div(255).contiguous(memory_format=torch.channels_last)


def augment(x, crop, flip, generator):
    """A random crop and a random horizontal flip of every image of x (B, C, H, W)."""
    b, _, h, w = x.shape
    if crop:
        dy, dx = torch.randint(0, 2 * crop + 1, (2, b), generator=generator, device=x.device)
        views = F.pad(x, (crop,) * 4).unfold(2, h, 1).unfold(3, w, 1)        # (B, C, offset, offset, H, W)
        x = views[torch.arange(b, device=x.device), :, dy, dx]
    if flip:
        mirrored = torch.rand(b, 1, 1, 1, generator=generator, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    return x


def balanced(labels, count=None):
    """Indices (count,) of the first images of each class in turn, so that every prefix is balanced too."""
    turn = np.empty(len(labels), int)                            # 0 for the first image of its class, ...
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, turn))[:count]                    # by turn, then by label


def load_data(args):
    """The flags' data set, as Data on args.device: from args.data_dir, in class folders
    NAME/{train,test}/<class>/* ({train,val}: photos) or else as torchvision lays it out, or downloaded;
    digits: from data/."""
    name, root = args.dataset, Path(args.data_dir)
    if name == "digits":
        with np.load(Path(__file__).parent / "data" / "digits.npz") as stored:       # grey levels 0 to 16
            x, y = np.rint(stored["images"][:, None] * (255 / 16)).astype(np.uint8), stored["labels"]
        train, test, classes = (x[:-360], y[:-360]), (x[-360:], y[-360:]), [str(d) for d in range(10)]
    elif (root / name / "train").is_dir():
        train, test, classes = read_folders(root / name, args.workers, name not in TORCHVISION)
    elif name in TORCHVISION:
        train, test, classes = by_rank_0(lambda: read_torchvision(name, root))
    else:
        raise UsageFault(f"argument --dataset: there is no folder {root / name / 'train'} of class folders")
    eval_images = args.eval_images
    if eval_images is None:
        eval_images = min(max(1000, len(classes)), len(test[1])) if args.device == "cpu" else 0
    train = subset(*train, args, "--train-images", args.train_images, max(len(classes), 2 * world()))
    test = subset(*test, args, "--eval-images", eval_images, len(classes))
    if isinstance(test[0], Photos):                              # decoded once: attacks come back to them
        images = torch.empty(test[0].shape, dtype=torch.uint8, device=args.device)
        parts = torch.arange(len(images)).split(50)
        for part, x in progress(zip(parts, test[0].load(parts, args.device)), "decoding", len(parts)):
            images[part] = x
        test = images, test[1]
    return Data(train, test, classes, **AUGMENTATION.get(name, {}))


def subset(images, labels, args, flag, count, least):
    """`count` balanced images, as many as `flag` says, or for 0 all; tensors on the device, or Photos."""
    if count and not least <= count <= len(labels):
        raise UsageFault(f"argument {flag}: {count} is not from {least} to {len(labels)} (all)")
    if 0 < count < len(labels):
        chosen = balanced(labels, count)
        images, labels = images[chosen], labels[chosen]
    is_files = images.dtype.kind == "S"                          # names of photos, as bytes
    images = Photos(images, args.workers) if is_files else torch.from_numpy(images).to(args.device)
    return images, torch.from_numpy(labels.astype(np.int64)).to(args.device)


def read_torchvision(name, root):
    """A known set as torchvision lays it out, downloaded if absent."""
    try:                            # RuntimeError, not ImportError, when torch and torchvision do not match
        import torchvision.datasets
        read = functools.partial(getattr(torchvision.datasets, TORCHVISION[name][0]), str(root))
        splits = [read(s if name == "svhn" else s == "train", download=True) for s in ("train", "test")]
    except Exception as fault:                                   # unpickling can raise anything
        raise Fault(f"torchvision neither reads nor downloads {name} in {root / TORCHVISION[name][1]} "
                    f"({first_line(fault)}), and there is no {root / name}/train; --dataset digits needs none"
                    ) from None
    pairs = [(np.asarray(s.data), np.asarray(s.labels if name == "svhn" else s.targets)) for s in splits]
    if name != "svhn":                                           # (N, H, W) or (N, H, W, C) -> (N, C, H, W)
        pairs = [(np.ascontiguousarray(np.moveaxis(x.reshape(*x.shape[:3], -1), 3, 1)), y) for x, y in pairs]
    return *pairs, getattr(splits[0], "classes", [str(d) for d in range(10)])


def read_folders(root, workers, allow_photos):
    """Class folders {train,test}/<class>/* of images of one size or, if allowed, {train,val} of photos. Only
    dot files and Thumbs.db are passed over."""
    def entries(folder):
        return sorted(e for e in os.listdir(folder) if e[0] != "." and e != "Thumbs.db")
    photos = allow_photos and (root / "val").is_dir() and not any(
        map(os.path.isdir, (root / "test").glob("*")))
    splits, labels, names = [], [], []
    for split in (root / "train", root / ("val" if photos else "test")):
        names.append([e for e in entries(split) if (split / e).is_dir()] if split.is_dir() else [])
        odd = sorted(set(names[0]) ^ set(names[-1]))
        if odd or len(names[0]) < 2:
            raise Fault(f"{split} has {len(names[-1])} class folders; wanted: two or more, those of train "
                        f"(differing: {', '.join(odd[:5]) or 'none'})")
        files = [[os.fsencode(f"{split / name}/{e}") for e in entries(split / name)] for name in names[0]]
        if [] in files:
            raise Fault(f"{split / names[0][files.index([])]} holds no images")
        splits.append(np.concatenate(files))
        labels.append(np.repeat(range(len(files)), [*map(len, files)]))
    train, test = splits if photos else read_images(splits, workers)
    order = balanced(labels[1])                                  # till now sorted by class
    return (train, labels[0]), (test[order], labels[1][order]), names[0]


def read_image(path):
    """An image file as uint8 (H, W, 3), and whether it is grey; Fault unless it has 8 bits a channel."""
    path = os.fsdecode(path)
    try:
        from PIL import Image
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its mode is {image.mode}, not 8 bits a channel")
            return np.array(image.convert("RGB")), image.mode in ("L", "LA", "1")
    except Exception as fault:                                   # a damaged file can raise anything
        reason = first_line(fault).replace(f" {path!r}", "")
        raise Fault(f"{path} cannot be read as an image ({reason})") from None


def read_images(splits, workers):
    """uint8 (N, C, H, W) of each list of image files, all of one size; C is 1 if all are grey and small."""
    files = np.concatenate(splits)
    with ThreadPoolExecutor(workers) as pool:
        images, grey = zip(*pool.map(read_image, files))
    for path, image in zip(files, images):
        if image.shape != images[0].shape:
            (h, w, _), (h0, w0, _) = image.shape, images[0].shape
            raise Fault(f"{os.fsdecode(path)} has {w}x{h} pixels, the first image {w0}x{h0}: sizes differ "
                        "(photos lie in train and val, without a test beside them)")
    channels = 1 if all(grey) and min(images[0].shape[:2]) < PHOTO else 3       # photos are in colour
    images = np.stack(images)[..., :channels].transpose(0, 3, 1, 2)
    return np.split(np.ascontiguousarray(images), [len(splits[0])])


# ---------------------------------------------------------------- networks
conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride=stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential() if c_in == c_out else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def stages(block, depth, widths):
    """Residual stages of `depth` blocks between these widths; all but the first begin with a stride of 2."""
    for i, (c, d) in enumerate(itertools.pairwise(widths)):
        yield nn.Sequential(block(c, d, 2 if i else 1), *(block(d, d, 1) for _ in range(1, depth)))


def resnet18(width, channels, classes, size):
    """ResNet-18 for small images, with the layer names of the common CIFAR implementation."""
    w = [c * width for c in (4, 4, 8, 16, 32)]
    return nn.Sequential(OrderedDict(conv1=conv3x3(channels, w[0]), bn1=nn.BatchNorm2d(w[0]), relu=nn.ReLU(),
        **{f"layer{i}": stage for i, stage in enumerate(stages(BasicBlock, 2, w), 1)},
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(w[4], classes)))


def vgg16(width, channels, classes, size):
    """VGG-16 with batch norm, convolution biases and one linear layer: the ADMM paper's."""
    layers = []
    for c, count in ((4, 2), (8, 2), (16, 3), (32, 3), (32, 3)):
        for _ in range(count):
            layers += [conv3x3(channels, c * width, bias=True), nn.BatchNorm2d(c * width), nn.ReLU()]
            channels = c * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1),
                                     flatten=nn.Flatten(), classifier=nn.Linear(channels, classes)))


class WideBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, c_out, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x):
        h = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + (self.shortcut(h) if self.shortcut else x)


def wrn28_4(width, channels, classes, size):
    """Wide ResNet 28-4, pre-activation, without the unused extra block that some public copies carry."""
    w = [c * width for c in (1, 4, 8, 16)]
    return nn.Sequential(OrderedDict(conv1=conv3x3(channels, w[0]),
        **{f"block{i}": stage for i, stage in enumerate(stages(WideBlock, 4, w), 1)},
        bn1=nn.BatchNorm2d(w[3]), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        fc=nn.Linear(w[3], classes)))


def cnn(width, channels, classes, size, convs, linear, padding=1, pool=1):
    """Convolutions (channels at width 16, kernel, stride), perhaps pooled, then linear layers (units)."""
    layers, (h, w) = [], size
    for c, kernel, stride in convs:
        before, channels = channels, math.ceil(c * width / 16)
        layers += [nn.Conv2d(before, channels, kernel, stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(pool)] if pool > 1 else []
        h, w = (((n + 2 * padding - kernel) // stride + 1) // pool for n in (h, w))
    layers, units = [*layers, nn.Flatten()], channels * h * w
    for n in linear:
        before, units = units, math.ceil(n * width / 16)
        layers += [nn.Linear(before, units), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(units, classes))


def lenet(width, channels, classes, size):
    """The ADMM paper's LeNets: the padded one (MNIST) for one channel, the unpadded one (CIFAR) for more."""
    if channels == 1:
        return cnn(width, channels, classes, size, ((32, 5, 1), (64, 5, 1)), (1024,), padding=2, pool=2)
    return cnn(width, channels, classes, size, ((96, 5, 1), (256, 5, 1)), (1920, 1344), padding=0, pool=2)


# Rules: the first layer is registered first, the classifier last; shortcut layers are named shortcut or
# downsample (binary_relax.py keeps them float); images are channels last, so flatten(), not view().
# removable_groups() tries out whether filters can go.
NETWORKS = {"resnet18": resnet18, "vgg16": vgg16, "wrn28_4": wrn28_4, "lenet": lenet,         # cnn_*: HYDRA's
            "cnn_small": functools.partial(cnn, convs=((16, 4, 2), (32, 4, 2)), linear=(100,)),
            "cnn_large": functools.partial(cnn, convs=((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)),
                                           linear=(512, 512)),
            "imagenet_resnet18": None, "imagenet_resnet50": None}     # torchvision's own, for photos


def build_network(arch, width, channels, classes, size, mean=None, std=None):
    """A network of NETWORKS for images (channels, *size), width 16 being standard; UsageFault if too deep.
    Given mean and std, one number a channel, it begins with (x - mean) / std; torchvision's always do."""
    photos = NETWORKS[arch] is None
    if photos and (channels, width) != (3, 16):
        raise UsageFault(f"argument --arch: {arch} is for colour images and has --width 16")
    least = {"resnet18": 8, "vgg16": 32, "lenet": 4 if channels == 1 else 16}.get(arch, 4)
    if min(size) < least:
        raise UsageFault(f"argument --arch: {arch} is too deep for {size[0]}x{size[1]}; its least is {least}")
    if photos:
        from torchvision import models
        model = models.get_model(arch.removeprefix("imagenet_"), num_classes=classes)
        return normalised(model, mean or (0.485, 0.456, 0.406), std or (0.229, 0.224, 0.225))
    return normalised(NETWORKS[arch](width, channels, classes, size), mean, std)


def normalised(model, mean, std):
    """The model, which from now on gets (x - mean) / std, if mean is given; its state dict stays the same."""
    if mean:
        for name, values in dict(mean=mean, std=std).items():
            model.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        model.register_forward_pre_hook(lambda model, inputs: ((inputs[0] - model.mean) / model.std,))
    return model


def network_of(args, data):
    """The arguments of build_network, which are stored in every saved network."""
    _, channels, *size = data.train[0].shape
    network = dict(arch=args.arch, width=args.width, channels=channels, classes=len(data.classes), size=size)
    if min(size) >= 224 and not args.arch.startswith("imagenet"):
        raise UsageFault(f"argument --arch: {args.arch} is for small images; photos want imagenet_resnet18 "
                         "(small images lie in train and test, photos in train and val)")
    if [len(args.mean or ()), len(args.std or ())] not in ([0, 0], [channels, channels]):
        raise UsageFault(f"argument --mean: it and --std want {channels} numbers each, one a channel")
    return network | (dict(mean=args.mean, std=args.std) if args.mean else {})


# ---------------------------------------------------------------- smaller networks
def channel_groups(model):
    """Channels that can only be removed together, from the network's graph: [(writers, norms, readers)],
    names of layers. writers, whose outputs are added up: {layer: the batch norm on its output alone, or
    None}; norms: the batch norms on the sum; readers: the convolutions and linear layers that get the sum,
    the latter perhaps as several features a channel. Logits are no group. Operations that this does not
    know are taken for ones that keep channels: removable_groups() tests that. Fault without a graph."""
    groups, group_of, modules = {}, {}, dict(model.named_modules())                  # group_of: {node: key}
    try:
        nodes = torch.fx.Tracer().trace(model).nodes
    except Exception as fault:                                   # of a fork's network it can raise anything
        raise Fault("no filter can be removed where torch.fx finds no graph "
                    f"({first_line(fault).partition('. ')[0]})") from None
    for node in nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        read = sorted({group_of[source] for source in node.all_input_nodes if source in group_of})
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            for key in read:
                groups[key][2].append(node.target)
            group_of[node] = len(group_of)
            groups[group_of[node]] = {node.target: None}, [], []
        elif read:
            source, (writers, norms, readers) = node.all_input_nodes[0], groups[read[0]]
            if isinstance(layer, nn.BatchNorm2d) and source.target in writers and len(source.users) == 1:
                writers[source.target] = node.target
            elif isinstance(layer, nn.BatchNorm2d):
                norms.append(node.target)
            group_of[node] = read[0]
            for key in read[1:]:                                     # a sum: the groups become one
                more = groups.pop(key)
                writers, norms, readers = writers | more[0], norms + more[1], readers + more[2]
                group_of |= {n: read[0] for n in group_of if group_of[n] == key}
            groups[read[0]] = writers, norms, readers
    return [group for group in groups.values() if group[2]]


def removable_groups(model, network):
    """channel_groups(model), tried out: Fault unless a copy that loses every other channel of each group
    computes what the network with zeros in their place does. It does not if, say, torch.cat, an addition of
    the image or an activation that is not 0 at 0 comes after a filter."""
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.groups > 1:
            raise Fault(f"filters cannot be removed from this network ({name} has groups of channels)")
    groups, copied = channel_groups(model), copy.deepcopy(model).cpu().float()
    with evaluating(copied) as generator:
        for p in copied.parameters():                            # else the signal could vanish on its way
            if p.dim() > 1:                                      # He's variance, where half the inputs stay
                p.normal_(0, 2 / math.sqrt(p[0].numel()), generator=generator)
        for t in (*copied.parameters(), *copied.buffers()):      # biases and means are 0 at first
            if t.dim() == 1 and t.is_floating_point():
                t += 0.1 * torch.rand(t.shape, generator=generator)
        x = torch.rand(2, network["channels"], *network["size"], generator=generator)
        masks = {name: torch.zeros_like(copied.get_submodule(name).weight, dtype=torch.bool)
                 for writers, _, _ in groups for name in writers}
        for mask in masks.values():
            mask[::2] = True
        try:
            masks = parameter_masks(copied, masks, filters=True)
            apply_masks_(copied, masks)
            zeroed = copied(x)
            gap = (remove_filters_(copied, masks)[0](x) - zeroed).abs().max() / zeroed.abs().max()
            reason = None if gap < 1e-4 else "zeros in their place give other logits"
        except Exception as fault:                               # of a fork's network it can raise anything
            reason = first_line(fault)
    if reason:
        raise Fault(f"filters cannot be removed from this network ({reason})")
    return groups


def without_channels(state, groups, alive):
    """A state dict reduced to the channels that are `alive`, a boolean (channels,) for each group."""
    state = dict(state)
    for (writers, norms, readers), kept in zip(groups, alive):
        for key, t in state.items():
            name = key.rpartition(".")[0]
            if t.dim() and name in (*writers, *writers.values(), *norms):
                t = t[kept]
            if t.dim() > 1 and name in readers:
                t = t[:, kept.repeat_interleave(t.shape[1] // len(kept))]
            state[key] = t
    return state


def resize_(model, state):
    """Loads the state into the model, first shrinking layers whose weights it has smaller."""
    for name, m in list(model.named_modules()):
        weight = state.get(f"{name}.weight")
        if weight is None or weight.shape == m.weight.shape:
            continue
        if isinstance(m, nn.Conv2d):
            new = nn.Conv2d(weight.shape[1], len(weight), m.kernel_size, m.stride, m.padding, m.dilation,
                            bias=m.bias is not None, padding_mode=m.padding_mode)
        elif isinstance(m, nn.Linear):
            new = nn.Linear(weight.shape[1], len(weight), m.bias is not None)
        else:
            new = nn.BatchNorm2d(len(weight), m.eps, m.momentum)
        model.set_submodule(name, new.to(m.weight).train(m.training))
    model.load_state_dict(state)
    return model


def topk_mask(values, ratio):
    """Boolean (n,), True at the ceil(n / ratio) largest of values (n,), of equal ones at the first. ratio is
    taken as the nearest fraction with a denominator up to a million."""
    kept = math.ceil(len(values) / Fraction(ratio).limit_denominator(10**6))     # floats: 65 / (13 / 3) > 15
    least = values.topk(kept, sorted=False).values.amin()        # kthvalue() is slow on a GPU
    above, equal = values > least, values == least
    return above | equal & (equal.cumsum(0) <= kept - above.sum())


def parameter_masks(model, masks, filters):
    """{parameter: boolean like it} from {layer: mask of its weight, True where it stays}; where filters are
    pruned, also for biases and batch norms of dead ones, which would otherwise still output constants. Of
    layers without a mask all filters stay."""
    groups = channel_groups(model) if filters else ()
    whole_layers = {name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool)
                    for writers, _, _ in groups for name in writers}
    masks = whole_layers | masks
    out = {f"{name}.weight": mask for name, mask in masks.items()}
    for writers, norms, _ in groups:
        alive = {name: masks[name].flatten(1).any(1) for name in writers}            # (S,)
        for name, norm in writers.items():
            out |= {f"{name}.bias": alive[name], f"{norm}.weight": alive[name], f"{norm}.bias": alive[name]}
        for norm in norms:                                           # of a sum: dead where all of it is
            out |= dict.fromkeys((f"{norm}.weight", f"{norm}.bias"), torch.stack([*alive.values()]).any(0))
    # Only real parameters: `out` also names biases that a layer lacks, and "None.weight".
    return {name: out[name] for name, _ in model.named_parameters() if name in out}


def apply_masks_(model, masks):
    """Sets what is pruned to zero; masks are those of parameter_masks."""
    for name, mask in masks.items():
        model.get_parameter(name).data.masked_fill_(~mask, 0)


def remove_filters_(model, masks):
    """Removes the channels that no layer writes, and the weights that read them; the output stays the same.
    Returns the network and masks of what remains zero: dead filters whose channel another layer writes."""
    groups = channel_groups(model)
    alive = [torch.stack([masks[f"{name}.weight"].flatten(1).any(1) for name in writers]).any(0)
             for writers, _, _ in groups]
    left = without_channels(masks, groups, alive)
    return resize_(model, without_channels(model.state_dict(), groups, alive)), left


# ---------------------------------------------------------------- training
def bfloat16_is_fast(device):
    """Whether the hardware multiplies bfloat16 itself: training is then faster than in float32."""
    if device != "cpu":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_tile"))


def autocast(args):
    """bfloat16 products in training where --amp says so; evaluation is always in float32."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp)


def prepare(model, args, tf32=True):
    """The network on its device, in the fast memory layout, compiled where --compile says so. tf32: whether
    a GPU's float32 convolutions may be rounded to it from now on."""
    model.to(args.device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, tf32
    torch.set_float32_matmul_precision("highest")
    for m in model.modules() if args.device == "cpu" else ():
        # Else oneDNN writes past a buffer in its backward pass (its issue 6035).
        narrow = isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.in_channels < 16
        if narrow and m.stride != (1, 1):
            m.weight.data = m.weight.data.clone(memory_format=torch.contiguous_format)
            m.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    if args.compile:
        torch._dynamo.config.recompile_limit = 64        # graphs, one a network and mode; then eager
        model.compile()
    return model


def make_optimizer(model, lr, epochs, data, args, adam=False, undecayed=(), rise=0.2):
    """SGD with Nesterov momentum, or Adam, and its schedule: from lr / 25 up to lr in a share `rise` of the
    steps, then down to 0."""
    groups = [dict(params=[*model.parameters()], weight_decay=args.weight_decay), dict(params=[*undecayed])]
    optimizer = torch.optim.Adam(groups, lr) if adam else torch.optim.SGD(
        groups, lr, args.momentum, nesterov=args.momentum > 0, fused=True)
    optimizer.register_step_pre_hook(lambda *_: average_(        # losses are means, and shares equally large
        [p.grad for group in groups for p in group["params"] if p.grad is not None]))
    steps = max(1, epochs * data.steps(args.batch_size))
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(       # it divides by pct_start * (steps + 1) - 1
        optimizer, lr, steps + 1, cycle_momentum=False, pct_start=0.3 if rise * (steps + 1) == 1 else rise)


@torch.compiler.set_stance("force_eager")                            # no compiling for these few passes
def reestimate_batchnorm_(model, batches, count):
    """Running statistics become averages over `count` batches: a cut moves every activation."""
    update_bn(progress(itertools.islice(batches, count), "batch norms", count), model)


def ramp(epoch, epochs):
    """The attack's strength in an epoch, counted from 0, if it grows to 1 over the first `epochs`."""
    return min(1.0, (epoch + 1) / max(1, epochs))


# ---------------------------------------------------------------- the attack
def margin_loss(logits, y):
    """Carlini and Wagner's l_inf loss (N,): largest other logit minus the true one, > 0 if misclassified."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -math.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]


LOSSES = {"ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"), "margin": margin_loss}


@contextlib.contextmanager
def frozen(model):
    """Inside, weights need no gradient (torch.compile would compute it); afterwards buffers are restored."""
    buffers = [(b, b.clone()) for b in model.buffers()] if any(m.training for m in model.modules()) else []
    weights = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        for buffer, before in buffers:
            buffer.copy_(before)


def pgd(model, x, y, epsilon, step_size, num_steps, *, loss="ce", random_start=True, start=None, eot=1,
        generator=None, anneal=False, broken_at=None):
    """Projected gradient ascent, l_inf (Madry et al. 2018): x <- clip(x + step_size * sign(grad loss)).
    x (N, C, H, W) in [0, 1], y (N,); epsilon and step_size in that unit. Returns x_adv, like x, within
    epsilon of x and within [0, 1]. FGSM: num_steps=1, step_size=epsilon, random_start=False. loss: 'ce',
    'margin' or f(logits, y) -> (N,). start: the first iterate, else random. eot: passes to average over, for
    random networks. Weights, .grad, modes and running statistics stay; model.eval() is up to the caller. For
    evaluation: with anneal the step falls geometrically to a tenth, and each move is three quarters new, one
    quarter the last (after APGD, Croce and Hein 2020); broken_at (N,) int receives an image's first
    misclassified iterate, at which it leaves the batch. Fault on pixels outside [0, 1] and on gradients that
    are not finite; on a GPU without broken_at, which waits for no check, such pixels end the process and such
    gradients make x_adv NaN."""
    if not 0 <= epsilon <= 1:
        raise Fault(f"epsilon is {epsilon}, and pixels are in [0, 1]: write 8 / 255, not 8")
    fits, message = ((x >= 0) & (x <= 1)).all(), "a pixel is not in [0, 1], as attacks and networks want it"
    if x.device.type == "cuda" and broken_at is None:
        torch._assert_async(fits, message)                       # ends the process, and nothing waits for it
    elif not fits:
        raise Fault(message)
    objective = loss if callable(loss) else LOSSES[loss]
    lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    if start is None:
        noise = torch.rand(x.shape, generator=generator, device=x.device) if random_start else 0.5
        start = x + epsilon * (2 * noise - 1)
    x_adv = previous = torch.clamp(start, lower, upper)
    done, live = x_adv.clone(), torch.arange(len(x), device=x.device)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    with frozen(model), torch.enable_grad():
        for t in range(num_steps):
            leaf = x_adv.detach().requires_grad_()
            gradient = 0
            for _ in range(eot):
                logits = model(leaf).float()
                gradient = gradient + torch.autograd.grad(objective(logits, y).sum(), leaf)[0]
            finite = gradient.isfinite().all() & finite
            size = step_size * 0.1 ** (t / max(1, num_steps - 1)) if anneal else step_size
            x_next = torch.clamp(x_adv + size * gradient.sign(), lower, upper)
            if anneal and t:
                x_next = torch.clamp(0.75 * x_next + 0.25 * (2 * x_adv - previous), lower, upper)
            if broken_at is not None:
                right = logits.argmax(1) == y
                gone, left = (~right).nonzero()[:, 0], right.nonzero()[:, 0]
                done[live[gone]], broken_at[live[gone]] = x_adv[gone], t
                state = x_next, x_adv, lower, upper, y, live
                x_next, x_adv, lower, upper, y, live = (v[left] for v in state)
            previous, x_adv = x_adv, x_next
            if not len(live):
                break
    done[live] = x_adv
    if x.device.type == "cuda" and broken_at is None:
        return torch.where(finite, done, math.nan)
    if not finite:
        raise Fault("the attack's gradient is not finite: training diverged (try a lower rate, or --amp off)")
    return done


# ---------------------------------------------------------------- evaluation and counting
def interval(accuracy, n, z=1.959964):
    """Wilson's 95 % interval [low, high] of an accuracy over n images, all in per cent."""
    p, spread = accuracy / 100, z * z / n
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return [round(100 * (middle + s * half) / (1 + spread), 2) + 0.0 for s in (-1, 1)]      # no -0.0


def per_cent(correct):
    return round(100 * correct.double().mean().item(), 3)


@contextlib.contextmanager
def exact_float32(benchmark=False):
    """Inside, float32 products have all digits (no TF32, no bfloat16), and convolutions are deterministic or,
    with `benchmark`, the fastest. torch has an old flag (torch.export reads it) and a new one for each and
    raises where they contradict: both are set. Afterwards all have their values again, but no longer follow
    torch.backends.fp32_precision."""
    def readable(flag, default):                 # torch refuses to read old flags that new ones contradict
        try:
            return flag()
        except RuntimeError:
            return default
    cudnn, onednn = torch.backends.cudnn, torch.backends.mkldnn
    kinds = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, onednn.conv, onednn.matmul)
    new, modes = [kind.fp32_precision for kind in kinds], (cudnn.benchmark, cudnn.deterministic)
    old = (readable(torch.get_float32_matmul_precision, "highest"),
           readable(lambda: cudnn.allow_tf32, False))
    def set_flags(matmul, convolutions, new, modes):
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = convolutions
        for kind, precision in zip(kinds, new):                  # after the old flags, which change them
            kind.fp32_precision = precision
        cudnn.benchmark, cudnn.deterministic = modes
    try:
        set_flags("highest", False, ["ieee"] * len(kinds), (benchmark, not benchmark))
        yield
    finally:
        set_flags(*old, new, modes)


@contextlib.contextmanager
def evaluating(*models, seed=0):
    """Eval mode, no gradients, exact_float32, own random numbers; undone afterwards."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    tensors = itertools.chain(models[0].parameters(), models[0].buffers(), [torch.empty(0)])
    device = next(tensors).device
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()   # manual_seed() seeds all
    try:
        for module, _ in modes:                                  # torch.export's modules refuse eval()
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(gpus), exact_float32():
            torch.manual_seed(seed)
            yield torch.Generator(device).manual_seed(seed)
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(model, x):
    """The logits of one batch; Fault if one is not finite, because the argmax of NaN looks like a class."""
    logits = model(x)
    if not torch.is_tensor(logits) or logits.dim() != 2:
        raise Fault("a network is to give logits, a tensor (N, classes)")
    if not logits.isfinite().all():
        raise Fault("the network's logits are not finite: no accuracy can be reported")
    return logits


def fraction_correct(model, x, y, draws):
    """(N,) float, 0 to 1: the share of `draws` passes that classify each image correctly."""
    return torch.stack([logits_of(model, x).argmax(1) == y for _ in range(draws)]).double().mean(0)


def is_random(model, x):
    """Whether two forward passes over the first images of x, uint8, differ."""
    a, b = (logits_of(model, to_float(x[:64])) for _ in range(2))
    return bool((a - b).abs().max() > 1e-4 * a.abs().max())


def checked(model, images):
    """(images, labels as int64); Fault unless they are uint8 (N, C, H, W) and the network's classes (N,)."""
    x, y = images
    whole_numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if x.dtype != torch.uint8 or x.dim() != 4 or not whole_numbers or y.shape != x.shape[:1] or not len(x):
        raise Fault(f"images are to be uint8 (N, C, H, W) and labels whole numbers (N,), not {x.dtype} "
                    f"{tuple(x.shape)} and {y.dtype} {tuple(y.shape)}")
    classes = logits_of(model, to_float(x[:1])).shape[1]
    if not 0 <= y.min() <= y.max() < classes:
        raise Fault(f"labels are from {y.min()} to {y.max()}, and the network has {classes} classes")
    return x, y.long()


def evaluation_batch(images):
    """How many images are evaluated at a time: of photos fewer, because they fill memory."""
    return min(250, max(1, 2**22 // math.prod(images.shape[1:])))


def batched(images, labels, *more, label="evaluation"):
    """Yields (x float, y, parts of `more`) in batches; what is written into a part changes the whole."""
    size = evaluation_batch(images)
    batches = list(zip(images.split(size), labels.split(size), *(m.split(size) for m in more)))
    for x, *rest in progress(batches, label, len(batches)):
        yield to_float(x), *rest


def first_broken_iterate(model, images, generator, *, epsilon, step_size, num_steps, restarts=1,
                         losses=("ce",), random_start=True, anneal=True):
    """(N,) int, the first misclassified iterate of the first restart that has one: -1 is the clean image,
    num_steps the last iterate, num_steps + 1 none. Broken images are not attacked again, but their noise is
    drawn, so that a restart does not depend on those before it: more of them can only break more images."""
    out = torch.full_like(images[1], num_steps + 1)
    for r, loss in enumerate(itertools.islice(itertools.cycle(losses), restarts)):
        for i, (x, y, first) in enumerate(batched(*images, out, label=f"attack {r + 1}/{restarts}")):
            noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1   # drawn for all images
            if i % world() != rank():                            # another process's share
                continue
            if r == 0:
                first[logits_of(model, x).argmax(1) != y] = -1
            right = first > num_steps
            if right.any():
                x, y, at = x[right], y[right], first[right]
                start = x + epsilon * noise[right] if random_start else x
                x_adv = pgd(model, x, y, epsilon, step_size, num_steps, loss=loss, start=start, anneal=anneal,
                            broken_at=at)
                at[(logits_of(model, x_adv).argmax(1) != y) & (at > num_steps)] = num_steps
                first[right] = at
    sync(dist.all_reduce, out, dist.ReduceOp.MIN)
    return out


def noisy_verdicts(model, images, generator, *, restarts, losses, **attack):
    """(clean, robust) of a random network, both (N,) float: the share of 10 passes that classify each image
    correctly, clean and in its worst form, which is whichever of the clean image and the restarts' last
    iterates has the lowest share. It gets 10 new passes: the lowest of noisy shares is biased downwards."""
    clean = torch.cat([fraction_correct(model, x, y, 10) for x, y in batched(*images, label="clean images")])
    robust = clean.clone()
    for x, y, out in batched(*images, robust, label="attack"):
        attacked = out > 0                                           # the others are never right as it is
        if not attacked.any():
            continue
        x, y, least = x[attacked], y[attacked], out[attacked]
        worst = x.clone()
        for loss in itertools.islice(itertools.cycle(losses), restarts):
            x_adv = pgd(model, x, y, loss=loss, generator=generator, **attack)
            found = fraction_correct(model, x_adv, y, 10)
            worst[found < least] = x_adv[found < least]
            least = least.minimum(found)
        out[attacked] = fraction_correct(model, worst, y, 10)
    return clean, robust


def evaluate(model, images, *, epsilon, step_size, num_steps, restarts=4, losses=("ce", "margin"),
             random_start=True, anneal=True, eot=10, seed=0, extra_metrics=None):
    """Clean and robust accuracy in per cent over images = (uint8 (N, C, H, W), labels (N,)), in float32.
    An image is robust if its clean form and every iterate of every restart are classified right; restarts
    take the losses in turn; with `anneal` step_size is that of the first step (the scripts': epsilon).
    A random network gets gradients averaged over `eot` passes and noisy_verdicts().
    Returns accuracies, 95 % intervals, images, attack, and what extra_metrics(model, robust (N,)) adds."""
    if restarts < 1 or not losses or isinstance(losses, str):
        raise Fault(f"an attack needs a restart and a list of losses, not {restarts} and {losses!r}")
    attack = dict(epsilon=epsilon, step_size=step_size, num_steps=num_steps, restarts=restarts,
                  losses=list(losses)[:restarts], random_start=random_start, anneal=anneal)
    with evaluating(model, seed=seed) as generator:
        images = checked(model, images)
        if is_random(model, images[0]):
            clean, robust = noisy_verdicts(model, images, generator, eot=eot, **attack)
            attack |= dict(eot=eot, draws=10)
        else:
            first = first_broken_iterate(model, images, generator, **attack)
            clean, robust = first >= 0, first > num_steps
    extra = extra_metrics(model, robust) if extra_metrics else {}
    n, clean, robust = len(clean), per_cent(clean), per_cent(robust)
    return dict(clean_acc=clean, clean_ci=interval(clean, n), robust_acc=robust, **extra,
                robust_ci=interval(robust, n), images=n, attack=dict(norm="l_inf", **attack, seed=seed))


def sanity_flags(model, images, *, epsilon, step_size, num_steps, anneal=True, eot=10, seed=0):
    """Reasons to doubt a robust accuracy (after Carlini et al. 2019, Athalye et al. 2018), as sentences, from
    the first 250 images or, for a random network, 100; that it is random is then the first sentence."""
    with evaluating(model, seed=seed) as generator:
        images, noisy = checked(model, images), is_random(model, images[0])
        images = [t[:100 if noisy else 250] for t in images]
        def robust(**attack):
            if noisy:
                return evaluate(model, images, restarts=1, eot=eot, seed=seed, **attack)["robust_acc"]
            first = first_broken_iterate(model, images, generator.manual_seed(seed), **attack)
            return per_cent(first > attack["num_steps"])
        slack, zero, right = max(2, 300 / len(images[1])), [], []    # slack: 2 % or 3 images
        logits = torch.cat([logits_of(model, x) for x, _ in batched(*images)])
        alone = torch.cat([logits_of(model, to_float(image[None])) for image in images[0][:32]])
        with frozen(model), torch.enable_grad():
            for x, y in batched(*images):
                loss = F.cross_entropy(model(x.requires_grad_()), y, reduction="sum")
                zero.append(torch.autograd.grad(loss, x)[0].flatten(1).abs().amax(1) == 0)
        zero = per_cent(torch.cat(zero))
        own = dict(epsilon=epsilon, step_size=step_size, num_steps=num_steps, anneal=anneal)
        found, twice = robust(**own), robust(**own | dict(num_steps=2 * num_steps))
        fgsm = robust(epsilon=epsilon, step_size=epsilon, num_steps=1, random_start=False)
        for x, y in batched(*images):
            bits = (torch.randint(0, 2, x.shape, generator=generator, device=x.device) for _ in range(20))
            corners = ((x + epsilon * (b * 2 - 1)).clamp(0, 1) for b in bits)
            right.append(torch.stack([fraction_correct(model, c, y, 10 if noisy else 1) for c in corners], 1))
        right = torch.cat(right)     # (N, 20): a noisy network's own mistakes would add up over the 20 passes
        noise = min(map(per_cent, right.T)) if noisy else per_cent((right == 1).all(1))
        far = robust(epsilon=1.0, step_size=1.0, num_steps=num_steps)
    return [sentence for raised, sentence in (
        (noisy, "random output, expected of a network with noise: two passes over one image differ"),
        (not noisy and (alone - logits[:32]).abs().max() > 1e-4 * logits.abs().max(),
         "batch-dependent output: an image's logits change with its neighbours"),
        (logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-4, "probabilities instead of logits"),
        (len(images[1].unique()) > 1 and len(logits.argmax(1).unique()) == 1, "one class for all images"),
        (zero > 10, f"zero gradients on {zero:.0f} % of the images"),
        (found - twice > slack, f"not converged: twice the steps lower {found:.1f} % to {twice:.1f} %"),
        (found - fgsm > slack, f"FGSM ({fgsm:.1f} %) is stronger than PGD ({found:.1f} %)"),
        (found - noise > slack, f"random noise ({noise:.1f} %) is stronger than PGD ({found:.1f} %)"),
        (far > 100 / logits.shape[1] + 5, f"epsilon 1 leaves {far:.1f} %, more than chance")) if raised]


def count_macs(model, network):
    """Multiply-accumulates of all convolutions and linear layers for one image."""
    image = torch.zeros(1, network["channels"], *network["size"], device=next(model.parameters()).device)
    with evaluating(model), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(image)                                 # without gradients torch may fuse what is not counted
    return counter.get_total_flops() // 2


def latency(models, network, batch_size, device):
    """Milliseconds of each model's forward pass, float32, channels last, timed in turn: the least of 16 or
    more passes, because other work on the machine only adds."""
    x = to_float(torch.zeros((batch_size, network["channels"], *network["size"]), device=device))
    times, wait = [], functools.partial(torch.cuda.synchronize, device) if device != "cpu" else lambda: None
    with torch.no_grad(), exact_float32(benchmark=True):
        while len(times) < 17 or times[-1][-1] - times[1][0] < 0.5:
            times.append([time.perf_counter()])
            for model in models:
                model(x)
                wait()
                times[-1].append(time.perf_counter())
    return [round(1000 * float(t), 3) for t in np.diff(times[1:], axis=1).min(0)]       # [0] warms up


def peak_memory():
    """The most bytes of main memory that this process held; None where the system does not tell."""
    with contextlib.suppress(OSError, TypeError):        # getrusage() may tell of the one that started this
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def plain_only(what):
    """Makes torch.load's refusal of what is no plain value or tensor, even NumPy's numbers, a TypeError."""
    try:
        yield
    except pickle.UnpicklingError as fault:
        found = re.search(r"GLOBAL ([\w.]+)|$", str(fault))[1]
        raise TypeError(f"{what} can hold plain values and tensors, not {found}") from None


def save_file(path, content):
    """Writes a dict of plain values and tensors, or raises TypeError if it holds anything else: afterwards
    the file is whole, or what it was before."""
    if rank():                                                   # rank 0 alone writes
        return
    temporary, came, before = Path(f"{path}.tmp"), [], {}
    with contextlib.suppress(ValueError):    # torch.save can lose signals: delayed, in the main thread only
        before = {s: signal.signal(s, lambda s, _: came.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(temporary, "wb") as file:              # given a path, torch.save stores it inside
            torch.save(dict(format=FORMAT, **content), file)
            file.flush()
            os.fsync(file.fileno())
        with plain_only(path):
            torch.load(temporary, "cpu", mmap=os.name != "nt", weights_only=True)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as fault:
        free = shutil.disk_usage(temporary.parent).free // 2**20
        raise Fault(f"{path} was not written ({first_line(fault)}); {free} MiB are free") from None
    finally:
        temporary.unlink(missing_ok=True)
        for sent, handler in before.items():
            signal.signal(sent, handler)
        for sent in came:
            signal.raise_signal(sent)


def read_file(path, own=True, **kinds):
    """What torch.save wrote; Fault unless whole, free of code and, if `own`, with these keys and types."""
    try:
        if (own or zipfile.is_zipfile(path)) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile                             # torch.load checks no checksum
        content = torch.load(path, map_location="cpu", weights_only=True)
        lacks = [k for k in kinds if not isinstance(content.get(k), kinds[k])]
        if own and (lacks or content["format"] != FORMAT):
            raise ValueError(f"format {content['format']}, wanted: {FORMAT}; lacks: {', '.join(lacks)}")
        return content
    except FileNotFoundError:
        raise Fault(f"there is no file {path}") from None
    except (PermissionError, IsADirectoryError, MemoryError):    # they say nothing about the content
        raise
    except Exception as fault:                                   # unpickling can raise anything
        reason = first_line(fault) if type(fault) is ValueError else type(fault).__name__
        what = "not the file wanted here" if own else (
            "holds more than tensors, which could run code: save its state dict alone")
        raise Fault(f"{path} is damaged or {what} ({reason})") from None


def save_model(path, script, kind, network, model, args, state=None, **more):
    """Writes a network, its `state` or the model's, for load_model, which calls script.build(artifact). kind:
    dense, compact or ticket. One tensor holds all values but zeros, to save space; a bit map says where."""
    state = {name: t.detach().cpu() for name, t in (state or model.state_dict()).items()}
    floats = {name: t for name, t in state.items() if t.is_floating_point()}
    values = torch.cat([t.flatten() for t in floats.values()])
    bits = zlib.compress(np.packbits((values != 0).numpy()).tobytes(), 9)
    attack = {k: vars(args)[k] for k in ("dataset", "epsilon", "eval_steps", "restarts", "eot") if k in args}
    save_file(path, dict(script=script, kind=kind, network=network, **more, values=values[values != 0],
        bits=torch.frombuffer(bytearray(bits), dtype=torch.uint8),
        shapes={name: list(t.shape) for name, t in floats.items()},
        counters={name: t.tolist() for name, t in state.items() if name not in floats},
        attack_settings=attack | dict(step_size=args.eval_step_size)))


@contextlib.contextmanager
def fitting(path, what="the network it names"):
    """Turns the errors of content that does not fit into a Fault."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
            zlib.error) as fault:
        raise Fault(f"{path} does not fit {what} ({first_line(fault)})") from None


def read_artifact(path):
    """What save_model wrote, with the weights as artifact["state"]."""
    artifact = read_file(path, script=str, kind=str, network=dict, values=torch.Tensor, bits=torch.Tensor,
                         shapes=dict, counters=dict, attack_settings=dict)
    values, shapes = artifact["values"], artifact["shapes"]
    with fitting(path):
        if not values.isfinite().all():
            raise ValueError("weights are not finite")
        sizes = [math.prod(shape) for shape in shapes.values()]
        packed = zlib.decompressobj().decompress(artifact["bits"].numpy().tobytes(), sum(sizes) // 8 + 1)
        kept = torch.from_numpy(np.unpackbits(np.frombuffer(packed, np.uint8), count=sum(sizes)).astype(bool))
        tensors = torch.zeros(len(kept), dtype=values.dtype).masked_scatter_(kept, values).split(sizes)
        state = {name: t.view(shapes[name]) for name, t in zip(shapes, tensors)}
        state |= {name: torch.tensor(count) for name, count in artifact["counters"].items()}
    return artifact | dict(state=state)


def read_model(path):
    """The artifact of a file that save_model wrote, and its network: an nn.Module in eval mode."""
    artifact, folder = read_artifact(path), Path(__file__).resolve().parent
    script, network = artifact["script"], artifact["network"]
    if not script.isidentifier() or not (folder / f"{script}.py").is_file():
        raise Fault(f"{path} was made by a script named {script}, which is not beside common.py")
    with fitting(path), torch.no_grad():
        sys.path.insert(0, str(folder))              # whatever modules of these names lie elsewhere
        try:
            build = importlib.import_module(script).build
        finally:
            sys.path.remove(str(folder))
        model = build(artifact).eval()
        if model(torch.zeros(1, network["channels"], *network["size"])).shape != (1, network["classes"]):
            raise ValueError("wrong number of classes")
    return artifact, model


def load_model(path):
    """The network in a model.pt or dense.pt: a plain nn.Module in eval mode on the CPU, [0, 1] to logits."""
    return read_model(path)[1]


def load_pretrained(model, path, network):
    """Loads into `model` a dense.pt of any script or a state dict as others publish it. UsageFault unless it
    holds just that network, dense."""
    if not Path(path).is_file():
        raise UsageFault(f"argument --pretrained: there is no file {path}")
    content = read_file(path, own=False)
    content = content if isinstance(content, dict) else {}
    if {"format", "script"} <= content.keys():
        artifact = read_artifact(path)
        state, kind, found = artifact["state"], artifact["kind"], artifact["network"]
        if (kind, found) != ("dense", network):
            raise UsageFault(f"argument --pretrained: {path} holds {kind} {found}, not dense {network}")
    else:
        state = published_state(content, model, path)
        mean, std = ([f"{v.item():g}" for v in getattr(model, k, ())] for k in ("mean", "std"))
        how = f"less {', '.join(mean)}, over {', '.join(std)}" if mean else "as they are: no --mean, no --std"
        print(f"{path}: taken for a network that gets images {how}")
    with fitting(path):
        model.load_state_dict(state)


def published_state(content, model, path):
    """The model's state dict from one that others published: wrapped in a dict, prefixed, with the names of
    kuangliu's networks or torchvision's."""
    def canonical(name):
        name = re.sub(r"^((module|model|_orig_mod)\.)+", "", name)
        return name.replace("shortcut.", "downsample.").replace("linear.", "fc.")
    for key in ("state_dict", "model_state_dict", "net", "model"):
        content = content[key] if isinstance(content.get(key), dict) else content
    left, state = {canonical(str(key)): t for key, t in content.items() if torch.is_tensor(t)}, {}
    for name, like in model.state_dict().items():
        default = like if name.endswith("num_batches_tracked") else None
        state[name] = t = left.pop(canonical(name), default)
        plain = t is not None and (t.layout, t.is_quantized, t.is_meta) == (torch.strided, False, False)
        odd = (f"missing (but {next(iter(left), 'nothing')} is there)" if t is None else
               "not finite" if plain else "no dense tensor")
        shape = tuple(t.shape) if plain and t.isfinite().all() else odd
        if shape != (wanted := tuple(like.shape)):
            raise UsageFault(f"argument --pretrained: {path}: its {name} is {shape}, wanted: {wanted}")
    for name in left:                                            # those of MadryLab's wrapper are duplicates
        if not name.startswith(("attacker.", "normalizer.")):
            raise UsageFault(f"argument --pretrained: {path}: its {name} has no place in the network")
    return state


# ---------------------------------------------------------------- the run
def default_folder(script, flags):
    """runs/ and a name of the script, its sizes, and its flags whose value is a word."""
    words = [script]
    for k, v in flags.items():
        if k in ("width", "seed", "ratio", "bits") and v is not None:
            words.append(f"{k[0]}{v:g}")
        elif k in ("dataset", "arch") or re.fullmatch("[a-z-]+", str(v)):
            words.append(Path(v).name)                               # a data set may be a path
    return f"runs/{'-'.join(words)}"


class Run:
    """One run's output folder: its log, its checkpoint and its result. phases: {name: epochs}, in order.
    A continued run goes through main again: epochs() gives nothing for the phases that are over, then loads
    the checkpoint, `saved`, in the phase where the run stopped. Until then main's networks do not have
    the run's weights: what main computes between phases must come from compute_once(), which remembers it,
    or stand under `if not run.saved`."""
    active = result = saved = phase = None                       # active: the run that this process is in
    where = ""                                                   # for messages: "pretrain 3/15: "

    def __init__(self, args, data, script, phases, argv=None):
        self.args, self.data, self.script, self.phases = args, data, Path(script).stem, phases
        may_differ = ("output", "resume", "data_dir", "workers", "device")       # in a continued run
        self.flags = {k: v for k, v in vars(args).items() if k not in may_differ}
        args.output = args.output or default_folder(self.script, self.flags)
        self.folder = Path(args.output)
        if not self.script.isidentifier() or f"{self.script}.py" not in os.listdir(Path(__file__).parent):
            raise UsageFault(f"{script} must lie beside common.py, with only letters, digits and _ in its "
                             "name: model.pt is read back through it")
        argv = sys.argv[1:] if argv is None else argv
        self.command = shlex.join([*LAUNCHER, f"{self.script}.py", *(a for a in argv if a != "--resume")])
        self.computed, self.seconds, self.begin = {}, {}, time.time()
        checksum = 0                                                 # of photos: of their labels alone
        for part in data.train:
            if torch.is_tensor(part):
                checksum = zlib.crc32(part.cpu().contiguous().numpy(), checksum)
        self.of_data = [len(data.train[1]), checksum]                # a continued run has the same
        sync(dist.barrier)                           # rank 0 may still be writing what it ran before this
        if (self.folder / "result.json").is_file():
            with fitting(self.folder / "result.json", "a run; without it --resume evaluates again"):
                self.result = json.loads((self.folder / "result.json").read_text())
                self.check_same(self.result, "finished; --resume prints its result")
            print(json.dumps(self.result, indent=1))
            return
        changed = self.read_checkpoint()
        sync(dist.barrier)                                       # before rank 0 writes, all have looked
        if Run.active:                                           # stopped by a fault, in this process
            Run.active.file.close()
        self.file = open(os.devnull, "w") if rank() else self.open_log()
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        Run.active = self
        if self.saved:
            print(f"continuing {self.folder} after epoch {self.saved['epoch']} of {self.saved['phase']}")
            if changed:
                self.log(note="continued with these changed", **changed)
        else:
            if args.resume:
                print(f"nothing to continue in {self.folder}, so this begins")
            self.log(script=self.script, **vars(args))

    def check_same(self, run, state):
        """UsageFault unless the folder holds this very run and --resume was given."""
        then, now = run["args"] | {"script": run["script"]}, self.flags | {"script": self.script}
        if changed := ", ".join(k for k in now if str(then.get(k)) != str(now[k])):
            raise UsageFault(f"argument --output: {self.folder} holds a different run ({changed} differ)")
        if not self.args.resume:
            raise UsageFault(f"argument --output: {self.folder} holds this run, {state}")

    def read_checkpoint(self):
        """Reads last.pt, if there is one; returns the evaluation flags and processes, where they changed."""
        path, log = self.folder / "last.pt", self.folder / "log.jsonl"
        if not path.is_file():
            if [*self.folder.glob("*.pt")] or log.is_file() and log.read_bytes().count(b"\n") > 1:
                raise UsageFault(f"argument --output: {self.folder} holds a run, but no last.pt to continue")
            return {}
        saved = read_file(path, script=str, args=dict, phase=str, epoch=int, states=dict, computed=dict,
                          seconds=dict, random=dict, log_size=int, of_data=list, processes=int)
        new = {k: v for k, v in self.flags.items() if k.startswith(("eval_", "restart", "eot"))}  # may change
        self.check_same(saved | dict(args=saved["args"] | new), "not finished; --resume continues it")
        if saved["of_data"] != self.of_data:
            raise UsageFault(f"argument --resume: {self.folder} was begun with other training images or "
                             f"labels: {saved['of_data'][0]:,}, now {self.of_data[0]:,}")
        if not 0 <= saved["epoch"] <= self.phases.get(saved["phase"], -1):
            raise Fault(f"{path} does not fit this run: epoch {saved['epoch']} of {saved['phase']}")
        if (saved["random"].get("cuda") is None) != (self.args.device == "cpu"):
            raise UsageFault(f"argument --device: {self.folder} was not begun on {self.args.device}")
        self.saved, self.computed, self.seconds = saved, saved["computed"], saved["seconds"]
        now, then = new | dict(processes=world()), saved["args"] | dict(processes=saved["processes"])
        return {k: v for k, v in now.items() if str(then.get(k)) != str(v)}

    def open_log(self):
        """log.jsonl, cut where the checkpoint ends and locked against other processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / "log.jsonl", "a")
        with contextlib.suppress(ImportError, OSError):          # Windows, or a file system without locks
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageFault(f"argument --output: another process is running in {self.folder}") from None
        file.truncate(min(self.saved["log_size"], file.tell()) if self.saved else 0)
        return file

    def log(self, **fields):
        """One line of key:value on stdout, and the same as JSON in log.jsonl."""
        if self.phase in self.phases:                            # each process measured its share
            names = [k for k, v in fields.items() if isinstance(v, float)]
            means = torch.tensor([fields[k] for k in names], dtype=torch.float64)
            average_([means])
            fields |= zip(names, means.tolist())
        if self.phase:
            fields = {"phase": self.phase, **fields, "seconds": round(time.time() - self.begin, 2)}
        shown = (f"{k}:{v:.5g}" if isinstance(v, float) else f"{k}:{v}" for k, v in fields.items())
        print(json.dumps(fields), file=self.file, flush=True)
        print(*shown, flush=True)

    def compute_once(self, name, compute):
        """A copy, on the CPU, of compute()'s plain values and tensors, which checkpoints keep. It is called
        once in a run's life, by rank 0 alone, so without evaluate() or what else processes do together."""
        if name not in self.computed:
            found, state = by_rank_0(lambda: (compute(), self.generator.get_state()))
            self.generator.set_state(state)                      # rank 0 may have drawn from it
            file = io.BytesIO()
            torch.save(found, file)
            file.seek(0)
            with plain_only(f"compute_once({name!r})"):
                self.computed[name] = torch.load(file, "cpu", weights_only=True)
        return copy.deepcopy(self.computed[name])

    def epochs(self, phase, **stateful):
        """Yields a phase's epochs, from 0, that are still to do; saves after each what is `stateful`."""
        first, count = 0, self.phases[phase]
        if self.saved and self.saved["phase"] != phase:          # the run was stopped in a later phase
            return
        self.phase = phase
        if self.saved:
            with fitting(self.folder / "last.pt", "this run"):
                for name, thing in stateful.items():
                    thing.load_state_dict(self.saved["states"][name])
                self.generator.set_state(self.saved["random"]["batches"])
                torch.set_rng_state(self.saved["random"]["cpu"])
            if self.args.device != "cpu":
                torch.cuda.set_rng_state(self.saved["random"]["cuda"], self.args.device)
            first, self.saved = self.saved["epoch"], None
        else:
            self.save(0, stateful)
        def seed(epoch):
            if world() > 1:                                      # noise is to differ between processes
                torch.manual_seed(zlib.crc32(f"{self.args.seed} {phase} {epoch} {rank()}".encode()))
        for epoch in range(first, count):
            seed(epoch)
            self.epoch, self.where = epoch, f"{phase} {epoch + 1}/{count}: "
            yield epoch
            self.seconds[phase] = self.seconds.get(phase, 0) + time.time() - self.begin
            self.begin = time.time()                             # time between phases is the next one's
            self.save(epoch + 1, stateful)
        seed(count)                                              # for what follows the phase
        self.phase, self.where = None, ""

    def save(self, epoch, stateful):
        parts = nn.ModuleList(m for m in stateful.values() if isinstance(m, nn.Module)).modules()
        average_([t for m in parts if isinstance(m, nn.BatchNorm2d) for t in (m.running_mean, m.running_var)])
        cuda = None if self.args.device == "cpu" else torch.cuda.get_rng_state(self.args.device)
        save_file(self.folder / "last.pt", dict(
            script=self.script, args=self.flags, phase=self.phase, epoch=epoch, computed=self.computed,
            states={name: thing.state_dict() for name, thing in stateful.items()}, seconds=self.seconds,
            random=dict(batches=self.generator.get_state(), cpu=torch.get_rng_state(), cuda=cuda),
            log_size=self.file.tell(), of_data=self.of_data, processes=world()))

    def batches(self):
        """One epoch's training batches, inside epochs(); the time to go is shown for all training."""
        if not self.phase:
            raise RuntimeError("between phases: data.batches(args.batch_size, run.generator)")
        size, steps = self.args.batch_size, self.data.steps(self.args.batch_size)
        names = [*self.phases]
        later = sum(self.phases[name] for name in names[names.index(self.phase):]) - self.epoch - 1
        return progress(self.data.batches(size, self.generator), self.where[:-2], steps, later * steps)

    def finish(self, extra_metrics=None, **more):
        """Reads dense.pt and model.pt back from disk, evaluates both, writes and returns result.json."""
        self.phase, args, device = "final", self.args, self.args.device
        json.dumps(more)                                         # a fork's TypeError comes before evaluation
        attack = dict(epsilon=args.epsilon, step_size=args.eval_step_size, num_steps=args.eval_steps,
                      seed=args.seed, eot=getattr(args, "eot", None) or 10)
        files = [self.folder / "dense.pt", self.folder / "model.pt"]
        sync(dist.barrier)                                       # rank 0 has written them
        (artifact, dense), (_, compact) = map(read_model, files)
        models = [m.to(device, memory_format=torch.channels_last) for m in (dense, compact)]
        found = [evaluate(m, self.data.test, restarts=args.restarts, extra_metrics=extra_metrics, **attack)
                 for m in models]
        network, flags = artifact["network"], sanity_flags(compact, self.data.test, **attack)
        size, macs = [file.stat().st_size for file in files], [count_macs(m, network) for m in models]
        count = [sum(p.numel() for p in m.parameters()) for m in models]
        spent = by_rank_0(lambda: {f"batch_{b}": latency(models, network, b, device) for b in (1, 128)})
        seconds = self.seconds | {"final": time.time() - self.begin}
        self.result = dict(script=self.script, command=self.command, args=self.flags,
            versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__),
            device="cpu" if device == "cpu" else torch.cuda.get_device_name(device), processes=world(),
            threads=torch.get_num_threads(), seconds={k: round(v, 1) for k, v in seconds.items()},
            train_images=len(self.data.train[1]), **found[1], flags=flags, dense=found[0],
            params_ratio=round(count[0] / count[1], 3), parameters=count[1], dense_parameters=count[0],
            nonzeros=sum(int(p.count_nonzero()) for p in compact.parameters()),
            bytes_ratio=round(size[0] / size[1], 3), bytes=size[1], dense_bytes=size[0],
            macs_ratio=round(macs[0] / macs[1], 3), macs=macs[1], dense_macs=macs[0],
            latency_ms={b: dict(zip(("dense", "compact"), pair)) for b, pair in spent.items()},
            memory_bytes=peak_memory(), **more,
            gpu_memory_bytes=None if device == "cpu" else torch.cuda.max_memory_allocated(device))
        if rank() == 0:                                          # first the file: a closed stdout ends a run
            (self.folder / "result.json.tmp").write_text(json.dumps(self.result, indent=1) + "\n")
            os.replace(self.folder / "result.json.tmp", self.folder / "result.json")
        row = "clean_acc robust_acc verified_acc images params_ratio bytes_ratio bytes dense_bytes macs_ratio"
        self.log(**{k: self.result[k] for k in row.split() if k in self.result},
                 dense_clean_acc=found[0]["clean_acc"], dense_robust_acc=found[0]["robust_acc"],
                 flags="; ".join(flags) or "none")
        self.file.close()
        Run.active = None
        return self.result
