"""Keeps the `[same]` sections of all scripts byte for byte the same.

    python variants/sync.py            copies each section from the first script that has it into the others
    python variants/sync.py --check    changes nothing; exits 1 and says where scripts differ

The scripts are, in this order, train_gpt.py, train_hybrid.py and variants/train_*.py. A section runs from its banner of
three lines to the next banner. Every script must have those of train_gpt.py; any may have more, such as a kernel's.
"""

import argparse
import re
import sys
from pathlib import Path

RULE = "# " + "-" * 118
BANNER = re.compile(f"^{RULE}\n# (.+)\n{RULE}\n", re.M)


def sections(text: str) -> dict[str, str]:
    """Name -> text of each [same] section of a script, in order, banner and all."""
    banners = list(BANNER.finditer(text))
    ends = [banner.start() for banner in banners[1:]] + [len(text)]
    return {banner[1]: text[banner.start():end] for banner, end in zip(banners, ends) if banner[1].endswith(" [same]")}


def difference(text: str, original: str) -> str:
    """The first line in which two sections differ, and its number from the banner."""
    lines, others = text.splitlines(), original.splitlines()
    for number, (line, other) in enumerate(zip([*lines, "(end)"], [*others, "(end)"]), 1):
        if line != other:
            return f"line {number} is {line!r}, and should be {other!r}"
    return "the last line is not finished"


def synchronise(scripts: list[Path], check: bool) -> list[str]:
    """Copies the sections, or with `check` only compares them. Returns what is wrong afterwards, a line each."""
    originals, required, faults = {}, list(sections(scripts[0].read_text())), []
    for script in scripts:
        text = script.read_text()
        found = sections(text)
        faults += [f"{script.name}: no section {name}" for name in required if name not in found]
        for name, section in found.items():
            source, original = originals.setdefault(name, (script, section))
            if section == original:
                continue
            if check:
                faults.append(f"{script.name}: {name} differs from {source.name}: {difference(section, original)}")
            text = text.replace(section, original)
        if not check and text != script.read_text():
            script.write_text(text)
            print(f"{script.name}: brought up to date")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where scripts differ")
    root = Path(__file__).resolve().parents[1]
    scripts = [root / "train_gpt.py", root / "train_hybrid.py", *sorted(root.glob("variants/train_*.py"))]
    faults = synchronise(scripts, parser.parse_args().check)
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
