"""`pip install .` installs the optimizers as `gluon_mvr`, which needs only torch."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import sys, torch
from gluon_mvr import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, MuonMVR, PreviousBatchMVR, SingleBatchMVR

assert not {"numpy", "optim", "training", "data", "common"} & sys.modules.keys(), "more than torch was imported"
torch.manual_seed(0)
x, y = torch.randn(64, 8), torch.randn(64, 4)
for kind in (Gluon, GluonMVR1, GluonMVR2, GluonMVR3, MuonMVR, PreviousBatchMVR, SingleBatchMVR):
    w = torch.nn.Parameter(torch.zeros(4, 8))
    opt = kind([w], lr=0.02)

    def closure():
        opt.zero_grad()
        loss = (x @ w.T - y).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = opt.step(closure)
    if hasattr(opt, "flush"):
        opt.flush()
    assert closure().item() < first, kind
print("trained", sys.modules["gluon_mvr"].__file__)
"""


def torch_alone(folder):
    """A folder of links to torch and its requirements only."""
    folder.mkdir()
    waiting, seen = ["torch"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        requirements = map(Requirement, found.requires or ())
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder


@pytest.mark.slow
def test_the_wheel_trains_with_torch_alone(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools leaves files where it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "optim"):
        (source / name).symlink_to(ROOT / name)
    wheels, installed = tmp_path / "wheels", tmp_path / "installed"
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run(build, check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = wheels.iterdir()
    tops = {Path(name).parts[0] for name in ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gluon_mvr"}
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", installed, wheel], check=True, capture_output=True)

    # -I and -S: no working directory, no environment variables, no site-packages.
    path = [str(installed), str(torch_alone(tmp_path / "torch_alone"))]
    program = f"import sys; sys.path += {path}\n{TRAIN}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trained") and str(installed) in done.stdout
