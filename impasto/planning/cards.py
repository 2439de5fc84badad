"""Graphics cards: how much memory they have, and how fast they are on paper.

Numbers are the vendors' own, of the card as it is sold: single precision from the shaders, half precision from the
tensor or matrix units, dense, summed in fp32, which is what torch asks them for (GeForce cards sum in fp16 twice as
fast, which nobody trains with). What a training reaches of it is another matter: see `time`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from impasto.core.errors import UserError
from impasto.planning.forecast import GIB


@dataclass(frozen=True)
class Card:
    """A card, or a size alone, of which no speed is known."""

    name: str
    #: of its memory, as sold; a driver, a desktop and error correction take some of it
    bytes: int
    #: 10^12 floating-point operations a second, by precision ("fp32", "fp16", "bf16"); a multiply-add is two
    tflops: Mapping[str, float] = field(default_factory=dict)
    #: of its memory, 10^9 bytes a second; 0 where it is not known
    bandwidth: float = 0.0
    #: where the numbers are from
    source: str = ""


#: the vendors' papers, by the word that the table has for them
SOURCES = {
    "pascal": "NVIDIA, GeForce GTX 10 product pages, and Tesla P100 whitepaper WP-08019",
    "volta": "NVIDIA, Tesla V100 datasheet",
    "turing": "NVIDIA, Turing GPU architecture whitepaper WP-09183, appendices; GeForce GTX 16 product pages; "
              "T4 datasheet",
    "ampere": "NVIDIA, Ampere GA102 GPU architecture whitepaper, appendices, and GeForce RTX 30 product pages; "
              "A100, A10 and A40 datasheets",
    "ada": "NVIDIA, Ada GPU architecture whitepaper, appendices, and GeForce RTX 40 product pages; L4 and L40S "
           "datasheets",
    "hopper": "NVIDIA, H100 and H200 datasheets (tensor figures there are with sparsity: half of them here)",
    "blackwell": "NVIDIA, RTX Blackwell GPU architecture whitepaper, appendices, and GeForce RTX 50 product pages",
    "rdna": "AMD, Radeon RX product pages, peak single and half precision",
    "cdna": "AMD, Instinct product pages, peak vector fp32 and matrix fp16",
}

#: what the half-precision units of a family know; others have fp16 alone
BF16 = ("ampere", "ada", "hopper", "blackwell", "rdna", "cdna")

#: name | GiB, the usual one first | TFLOPS fp32 | TFLOPS fp16, tensor or matrix | GB/s | family
TABLE = """
GTX 1060          | 6       | 4.4   | 0.069 | 192  | pascal
GTX 1070          | 8       | 6.5   | 0.10  | 256  | pascal
GTX 1080          | 8       | 8.9   | 0.14  | 320  | pascal
GTX 1080 Ti       | 11      | 11.3  | 0.18  | 484  | pascal
Tesla P100        | 16      | 9.3   | 18.7  | 732  | pascal
Tesla V100        | 16 32   | 15.7  | 125   | 900  | volta
GTX 1650          | 4       | 3.0   | 6.0   | 128  | turing
GTX 1660          | 6       | 5.0   | 10.0  | 192  | turing
GTX 1660 Super    | 6       | 5.0   | 10.0  | 336  | turing
GTX 1660 Ti       | 6       | 5.4   | 10.9  | 288  | turing
RTX 2060          | 6 12    | 6.5   | 25.8  | 336  | turing
RTX 2060 Super    | 8       | 7.2   | 28.7  | 448  | turing
RTX 2070          | 8       | 7.5   | 29.9  | 448  | turing
RTX 2070 Super    | 8       | 9.1   | 36.3  | 448  | turing
RTX 2080          | 8       | 10.1  | 40.3  | 448  | turing
RTX 2080 Super    | 8       | 11.2  | 44.6  | 496  | turing
RTX 2080 Ti       | 11      | 13.4  | 53.8  | 616  | turing
Titan RTX         | 24      | 16.3  | 130.5 | 672  | turing
T4                | 16      | 8.1   | 65    | 320  | turing
RTX 3050          | 8       | 9.1   | 18.2  | 224  | ampere
RTX 3060          | 12      | 12.7  | 25.5  | 360  | ampere
RTX 3060          | 8       | 12.7  | 25.5  | 240  | ampere
RTX 3060 Ti       | 8       | 16.2  | 32.4  | 448  | ampere
RTX 3070          | 8       | 20.3  | 40.6  | 448  | ampere
RTX 3070 Ti       | 8       | 21.7  | 43.5  | 608  | ampere
RTX 3080          | 10      | 29.8  | 59.5  | 760  | ampere
RTX 3080          | 12      | 30.6  | 61.3  | 912  | ampere
RTX 3080 Ti       | 12      | 34.1  | 68.2  | 912  | ampere
RTX 3090          | 24      | 35.6  | 71    | 936  | ampere
RTX 3090 Ti       | 24      | 40.0  | 80    | 1008 | ampere
RTX A4000         | 16      | 19.2  | 76.7  | 448  | ampere
RTX A5000         | 24      | 27.8  | 111.1 | 768  | ampere
RTX A6000         | 48      | 38.7  | 154.8 | 768  | ampere
A10               | 24      | 31.2  | 125   | 600  | ampere
A10G              | 24      | 31.5  | 70    | 600  | ampere
A40               | 48      | 37.4  | 149.7 | 696  | ampere
A100              | 40      | 19.5  | 312   | 1555 | ampere
A100              | 80      | 19.5  | 312   | 2039 | ampere
A100 PCIe         | 40      | 19.5  | 312   | 1555 | ampere
A100 PCIe         | 80      | 19.5  | 312   | 1935 | ampere
RTX 4060          | 8       | 15.1  | 30.2  | 272  | ada
RTX 4060 Ti       | 8 16    | 22.1  | 44.1  | 288  | ada
RTX 4070          | 12      | 29.1  | 58.3  | 504  | ada
RTX 4070 Super    | 12      | 35.5  | 71    | 504  | ada
RTX 4070 Ti       | 12      | 40.1  | 80.2  | 504  | ada
RTX 4070 Ti Super | 16      | 44.1  | 88.2  | 672  | ada
RTX 4080          | 16      | 48.7  | 97.5  | 717  | ada
RTX 4080 Super    | 16      | 52.2  | 104.4 | 736  | ada
RTX 4090          | 24      | 82.6  | 165.2 | 1008 | ada
RTX 6000 Ada      | 48      | 91.1  | 364.2 | 960  | ada
L4                | 24      | 30.3  | 121   | 300  | ada
L40S              | 48      | 91.6  | 362   | 864  | ada
H100              | 80      | 67    | 989   | 3350 | hopper
H100 PCIe         | 80      | 51    | 756   | 2000 | hopper
H200              | 141     | 67    | 989   | 4800 | hopper
RTX 5060          | 8       | 19.2  | 38.4  | 448  | blackwell
RTX 5060 Ti       | 8 16    | 23.7  | 47.4  | 448  | blackwell
RTX 5070          | 12      | 30.9  | 61.7  | 672  | blackwell
RTX 5070 Ti       | 16      | 43.9  | 87.9  | 896  | blackwell
RTX 5080          | 16      | 56.3  | 112.6 | 960  | blackwell
RTX 5090          | 32      | 104.8 | 209.5 | 1792 | blackwell
RX 6800 XT        | 16      | 20.7  | 41.5  | 512  | rdna
RX 6900 XT        | 16      | 23.0  | 46.1  | 512  | rdna
RX 7800 XT        | 16      | 37.3  | 74.6  | 624  | rdna
RX 7900 XT        | 20      | 51.5  | 103   | 800  | rdna
RX 7900 XTX       | 24      | 61.4  | 122.8 | 960  | rdna
RX 9070 XT        | 16      | 48.7  | 97.3  | 640  | rdna
MI210             | 64      | 22.6  | 181   | 1638 | cdna
MI300X            | 192     | 163.4 | 1307  | 5300 | cdna
"""

#: words of a card's full name that tell nothing
NOISE = re.compile(r"nvidia|geforce|tesla|quadro|amd|radeon|instinct|graphics|generation|\(tm\)|\(r\)|hbm\d\w?|"
                   r"sxm\d?|[^a-z0-9.]")
#: a memory beside a name: 12GB, or a number at the end
MEMORY = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})\s*g(?:i?b)?(?![a-z0-9])|(?<=\s)(\d{1,2})$)")
#: bytes of the units that a size may have. Cards are sold in GB and have GiB
UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": 2**20, "mb": 2**20, "mib": 2**20}
#: a bare number above it is a model's
LARGEST = 512


def _cards() -> list[Card]:
    """The table's rows, one for each size of memory."""
    made = []
    for row in TABLE.strip().splitlines():
        name, sizes, fp32, half, bandwidth, family = (cell.strip() for cell in row.split("|"))
        tflops = {"fp32": float(fp32), "fp16": float(half)} | ({"bf16": float(half)} if family in BF16 else {})
        made += [Card(f"{name} {size}GB", int(size) * GIB, tflops, float(bandwidth), SOURCES[family])
                 for size in sizes.split()]
    return made


#: all that are known; of one name the usual memory comes first
CARDS = _cards()


def card_of(text: str) -> Card:
    """The card, or the size of one, that a text means: "RTX 3060", "3060", "NVIDIA A100-SXM4-80GB", "16GiB", "12".

    Of a card that is sold with several memories it is the first in the table unless the text says which. Raises
    `UserError` for a name that is not known, with the nearest one.
    """
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower()):
        number, unit = float(size[1]), size[2]
        if number > 0 and unit in UNITS and (unit or number <= LARGEST):
            return Card(f"{number:g} {'MiB' if unit.startswith('m') else 'GiB'}", round(number * UNITS[unit]))
    told = MEMORY.search(text.lower())
    memory = int(told[1] or told[2]) * GIB if told else None
    words = _plain(MEMORY.sub(" ", text.lower(), count=1))
    fitting = [card for card in CARDS if _is(card, words)]
    for card in fitting:
        if memory in (None, card.bytes):
            return card
    if fitting:
        sizes = " or ".join(f"{card.bytes // GIB}" for card in fitting)
        raise UserError(f"a {fitting[0].name.rpartition(' ')[0]} has {sizes} GiB", where=f"card {text!r}",
                        fix="give the size alone to plan for that much")
    raise UserError("is no card that is known here", where=f"card {text!r}", fix=f"{_hint(words)} Or give its memory, "
                    "as in 12GiB")


def _plain(text: str) -> str:
    return NOISE.sub("", text.lower())


def _is(card: Card, words: str) -> bool:
    """Whether these are its name, or its number alone: 3060, 7900xtx."""
    name = _plain(card.name.rpartition(" ")[0])
    return words in (name, re.sub(r"^(?:rtx|gtx|rx)(?=\d)", "", name))


def _hint(words: str) -> str:
    """The nearest known name."""
    known = {_plain(name): name for name in (card.name.rpartition(" ")[0] for card in CARDS)}
    bare = {re.sub(r"^(?:rtx|gtx|rx)(?=\d)", "", plain): name for plain, name in known.items()}
    close = difflib.get_close_matches(words, known | bare, n=1, cutoff=0.5)
    return f"Did you mean {(known | bare)[close[0]]!r}?" if close else "Known are the usual ones from NVIDIA and AMD"
