"""The documentation: its code runs, the files and commands it names exist, and removed names are gone."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [name for name in TRACKED if name.endswith(".md")]
# In results/, commands write the other pages.
WRITTEN = [name for name in PAGES if not name.startswith("results/") or Path(name).name in ("README.md", "reliability.md")]
README = (ROOT / "README.md").read_text()
# Names of options, files and readings that no longer exist.
REMOVED = re.compile(
    r"correction[_-](?:every|fraction)|\binner=|GluonMVR2\(inner|mvr3_b512_(?:nested|beta02)|results/<run>|\boverlap="
    r"|optim/sharding|optim/diagnostics|scripts/(?:figures|sweep|rates|corpus|smoothness|diagnostics|kill_test)\.py"
    r"|experiments[./](?:corpus|smoothness|diagnostics|record)\b|docs/records"
)

pytestmark = pytest.mark.skipif(not TRACKED, reason="not a git checkout")


def blocks(language):
    """The fenced blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_of_the_readme_run():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 4, bias=False))
    before = [p.clone() for p in model.parameters()]
    batches = [(torch.randn(5, 6), torch.randn(5, 4)) for _ in range(3)]
    names = {
        "model": lambda x, y: (model(x) - y).square().mean(),
        "hidden": [model[0].weight],
        "head": [model[1].weight],
        "batches": batches,
    }
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["opt"].updates == len(batches)
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))

    # The README's Nesterov momentum is SingleBatchMVR with γ = 1-β.
    from optim import SingleBatchMVR

    def trained(kind, **options):
        w = torch.nn.Parameter(before[0].detach().clone())
        opt = kind([w], lr=0.1, **options)
        for x, _ in batches:
            (x @ w.T).square().sum().backward()
            opt.step()
        return w

    torch.testing.assert_close(trained(names["Nesterov"]), trained(SingleBatchMVR, gamma=1 - 0.9))


def test_commands_of_the_readme_name_what_exists():
    from training.config import OPTIONS

    text = "\n".join(blocks("bash"))
    configs, scripts = re.findall(r"configs/\w+\.py", text), re.findall(r"(?:bash |sbatch .*?)(scripts/\w+\.sh)", text)
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert configs and scripts and modules
    for path in configs + scripts:
        assert (ROOT / path).is_file(), path
    for module in modules:
        assert find_spec(module), module
    for line in text.replace("\\\n", " ").splitlines():
        if match := re.search(r"(?:train_gpt\.py|slurm\.sh) (.*)", line):
            flags = set(re.findall(r"--([a-z-]+)", match[1])) - {"config", "help"}
            assert {flag.replace("-", "_") for flag in flags} <= OPTIONS.keys(), line


def prose(page):
    """The lines of a page outside tables and code blocks, and without links."""
    fenced = False
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    ") and not line.lstrip().startswith(("|", "<!--")) and "](" not in line:
            yield number, line


@pytest.mark.parametrize("page", WRITTEN)
def test_prose_is_wrapped(page):
    long = [f"{page}:{number} ({len(line)})" for number, line in prose(page) if len(line) > 100]
    assert not long, f"wrap at 100 columns: {', '.join(long)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target
        not_run_yet = page == "results/README.md" and not path.parent.exists()  # a study's folder comes with its results
        assert "://" in target or not_run_yet or path.exists(), f"{page} links to {target}"


def test_removed_names_appear_nowhere():
    found = []
    for name in TRACKED:
        # Tests and the log may use removed names.
        if name.startswith("tests/") or name in ("CHANGELOG.md", "docs/log.md"):
            continue
        if name.endswith((".md", ".py", ".sh", ".toml", ".yaml", ".cff")):
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if match := REMOVED.search(line):
                    found.append(f"{name}:{number}: {match[0]}")
    assert not found, f"removed names: {', '.join(found)}"


def test_the_pattern_of_removed_names_finds_them():
    for text in (
        "--correction-every 4",
        "correction_fraction=0.5",
        "GluonMVR2(inner=0.5)",
        "results/<run>/",
        "scripts/sweep.py",
    ):
        assert REMOVED.search(text)
