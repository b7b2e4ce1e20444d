"""Pretrained weights: what they are called, whether they are here, and what they hold.

They lie in the folder of weights (downloaded, or put there beforehand) or in a package.
Torch is imported only where weights are read: a job that finds all its features kept
reads none.
"""

import functools
import hashlib
import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.backbones import FILE, HOSTS, NO_LICENCE, PIN, RANDOM, found
from service.errors import GraftError, InvalidInput, Reason, WrongState
from trainer import liveness
from trainer.division import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

_READ_S = 600.0
"""Longest time to read a file of weights from a network's folder."""
_HASH = re.compile(r"-([0-9a-f]{8,})\.")
_PINNED = 16
"""Digits of a sha256 after the name of weights that are called by their file's."""
_WRAPPED = ("state_dict", "model")
"""Where training scripts put the tensors beside other things."""
_HEADS = ("head", "heads", "fc", "classifier", "_fc")
"""Begin the names of tensors that tell classes, in networks of all kinds."""
_COUNTED = "num_batches_tracked"
"""Ends the names of tensors that old files have none of, and that nothing here reads."""
_SHOWN = 5


class Weights:
    """The weights that a job asks for by `asked`, "" for the backbone's default.

    Raises InvalidInput for a backbone or weights that there are none of.
    """

    def __init__(self, backbone: str, asked: str, seed: int, folder: Path) -> None:
        row = found(backbone)
        self._name = row.weights_name(asked)
        if row.source == "timm":
            from trainer import timm_networks

            is_own = not self.is_random and not self.is_file
            row = timm_networks.settled(row, self._name.partition(PIN)[0] if is_own else "")
            self._name = row.weights_name(self._name)
            if not self._name:
                raise InvalidInput(
                    Reason.INVALID_FIELD,
                    f"timm has no weights for {row.name}: say {RANDOM}, or {FILE}NAME for a file "
                    "in the folder of weights",
                    field="weights",
                )
        self.row = row
        """What is known of the backbone, what timm says of it included."""
        self._seed = seed
        file = row.weights_file(self._name)
        self._path = folder / file if file else None

    @property
    def is_random(self) -> bool:
        """Whether they follow the seed."""
        return self._name == RANDOM

    @property
    def is_file(self) -> bool:
        """Whether they are a file of the operator's."""
        return self._name.startswith(FILE)

    @property
    def is_named_by_digest(self) -> bool:
        """Whether their name holds their file's digest: anything may lie under the file's name."""
        return not self.is_random and (self.is_file or self.row.source == "timm")

    @property
    def name(self) -> str:
        """What they are called in a manifest; without a digest while their file is not here."""
        if self.is_random:
            return f"{RANDOM}:{self._seed}"
        if not self.is_named_by_digest or PIN in self._name or not self.is_available():
            return self._name
        assert self._path is not None
        with _readable(self._path):
            return f"{self._name}{PIN}{_digest(self._path)[:_PINNED]}"

    @property
    def licence(self) -> str:
        """As their publisher names it; "" of random ones."""
        if self.is_random:
            return ""
        return NO_LICENCE if self.is_file else self.row.licence

    def is_available(self) -> bool:
        """Whether they can be read without a download."""
        try:
            return self._path is None or self._path.exists()
        except PermissionError:
            return True  # and reading says what to do

    def fetch(self) -> None:
        """Downloads them where need be; raises WrongState (WEIGHTS_UNAVAILABLE)."""
        if self.is_available():
            return
        assert self._path is not None
        if self.is_file:
            raise WrongState(
                Reason.WEIGHTS_UNAVAILABLE,
                f"there is no file {self._path.name} in the folder of weights "
                f"{self._path.parent}: put it there, or name one that is",
            )
        with _readable(self._path):
            if self.row.source == "timm":
                from trainer import timm_networks

                timm_networks.download(self.row, self._path)
            else:
                from trainer.download import download

                download(self._url, self._path, self._prefix)

    def read(self) -> "State":
        """Returns the tensors by name, fetched if need be; raises WrongState."""
        if self._path is None:
            return _tensors(_file_of(self._name.rpartition("-")[0]))
        self.fetch()
        with _readable(self._path), liveness.waiting(_READ_S):
            if self._prefix and not (actual := _digest(self._path)).startswith(self._prefix):
                what, remedy = "the file that was asked for", "put that file there"
                if not self.is_named_by_digest:
                    what = "what its name says"
                    remedy = f"delete it, or put the file from {self._url} there"
                raise WrongState(
                    Reason.WEIGHTS_UNAVAILABLE,
                    f"{self._path} is not {what}: its sha256 begins with {actual[:_PINNED]}, not "
                    f"with {self._prefix}; {remedy}",
                )
            return _tensors(self._path)

    def fill(self, network: "nn.Module", state: "State", heads: Sequence[str] = _HEADS) -> None:
        """Sets a network's tensors to those of the same names, which must be all and no others.

        Others may begin with one of `heads`, and are left out. Raises InvalidInput about a
        file, WrongState (WEIGHTS_UNAVAILABLE) about what was published.
        """
        own = network.state_dict()
        problems = [
            ("missing", [
                name for name in own if name not in state and not name.endswith(_COUNTED)
            ]),
            ("of another shape", [
                f"{name} ({_shape(state[name])} instead of {_shape(own[name])})"
                for name in own if name in state and state[name].shape != own[name].shape
            ]),
            ("unknown", [
                name for name in state if name not in own and name.split(".")[0] not in heads
            ]),
        ]  # fmt: skip
        told = [f"{kind}: {listed(names, _SHOWN)}" for kind, names in problems if names]
        if told:
            text = f"the tensors of {self.name} do not fit {self.row.name}; {'; '.join(told)}"
            raise self.misfit(text)
        network.load_state_dict({name: state[name] for name in own if name in state})

    def misfit(self, text: str) -> GraftError:
        """Returns the error for weights that are of another network."""
        if self.is_file:
            return InvalidInput(
                Reason.INVALID_FIELD, f"{text}; name the backbone that they are of", field="weights"
            )
        where = "install the versions that pyproject.toml names"
        if self._path is not None:
            where = f"delete {self._path}, or put the right file there"
        return WrongState(Reason.WEIGHTS_UNAVAILABLE, f"{text}; {where}")

    @property
    def _url(self) -> str:
        assert self._path is not None
        return f"https://{HOSTS[self.row.source]}/models/{self._path.name}"

    @property
    def _prefix(self) -> str:
        """The beginning of the file's sha256, lower-case hex; "" where it may be any file."""
        if self.is_named_by_digest:
            return self._name.partition(PIN)[2]
        assert self._path is not None
        hashed = _HASH.search(self._path.name)
        assert hashed, f"torchvision names its files by their sha256, not {self._path.name}"
        return hashed[1]


def _file_of(package: str) -> Path:
    module = importlib.import_module(package.replace("-", "_"))
    (kind,) = [name for name in dir(module) if name.endswith("ModelFile")]
    return Path(getattr(module, kind).get_model_file_path())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"this user may not read the pretrained weights {path} ({error.strerror}): let it read "
            f"the file and enter the folder (chmod a+rX {path.parent} {path}), or give this "
            "server a folder of its own",
        ) from error


def _digest(path: Path) -> str:
    # A mirror may hold anything under the right name.
    stat = path.stat()
    return _digest_of(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _digest_of(path: Path, _changed_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(path: Path) -> "State":
    """Reads a file without running anything that it holds."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        given = torch.load(path, map_location="cpu", weights_only=True)
        for key in _WRAPPED:
            if isinstance(given.get(key), dict):
                given = given[key]
        tensors = {
            str(name).removeprefix("module."): value
            for name, value in given.items()
            if isinstance(value, torch.Tensor)
        }
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's and safetensors' own, of many kinds
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"{path} holds no tensors by name that can be read ({type(error).__name__}): write "
            "them with safetensors, or with torch.save(network.state_dict(), FILE)",
        ) from error
    return tensors


def _shape(tensor: "Tensor") -> str:
    return str(list(tensor.shape))
