"""Molecules as SMILES: parse with RDKit's own reason, canonicalise, clean, randomise.

RDKit prints nothing here: its error log is captured and becomes the reason of the error. RDKit itself can end the
process on absurd input (deep recursion on very long strings), so strings above `MAX_SMILES_CHARS` are refused before
parsing, and `biokit.data.guarded` runs bulk work in processes whose death costs one row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rdkit import Chem, rdBase

from biokit.errors import DataError

Mol = Chem.Mol

MAX_SMILES_CHARS = 20_000

CHANGES = (
    "salts_stripped",
    "salts_kept",
    "atom_maps_stripped",
    "atom_maps_kept",
    "neutralized",
    "tautomer_changed",
    "stereo_lost",
    "charge_changed",
    "isotopes_lost",
)
"""What cleaning may do to a molecule, or see and keep; a `CleanedMolecule` names those that apply."""

_BRACKET_ATOM = re.compile(r"\[(\d*)([^\]:+-]*)([+-]*)(\d*)(:\d+)?\]")  # isotope, symbol, signs, charge, map
_CHIRAL_MARK = re.compile(r"@+")
_NOT_SMILES = re.compile(r"[^!-~]")  # no space either: RDKit would read "CC O" as the molecule CC named O


@dataclass(frozen=True, slots=True)
class CleanOptions:
    """How `clean_molecule` treats salts ("strip" or "keep"), atom maps, charges and tautomers."""

    salts: str = "strip"
    atom_maps: str = "strip"
    neutralize: bool = False
    canonical_tautomer: bool = False


@dataclass(slots=True)
class CleanedMolecule:
    """A canonical SMILES, the molecule behind it, and which of `CHANGES` apply."""

    smiles: str
    mol: Mol
    changes: tuple[str, ...] = ()


def parse_smiles(smiles: str) -> Mol:
    """Parse and sanitise one SMILES (no CXSMILES extension, no name).

    Raises:
        DataError: with RDKit's reason (unclosed ring, valence, kekulisation, ...) in `found`.
    """
    reason = _refusal(smiles)
    if not reason:
        with rdBase.BlockLogs(), rdBase.CaptureErrorLog() as log:
            try:
                mol = Chem.MolFromSmiles(smiles)
            except (RuntimeError, ValueError, MemoryError) as error:
                mol, reason = None, _first_line(str(error))
        if mol is not None:
            return mol
        reason = reason or _parser_reason(log.messages)
    raise DataError(f'SMILES "{_shown(smiles)}"', f"cannot be parsed ({reason})", "Correct it, or leave it out")


def parse_mol_block(block: str) -> Mol:
    """Parse and sanitise one MDL mol block (a record of an .sdf, without its data fields).

    Raises:
        DataError: with RDKit's reason in `found`.
    """
    reason = ""
    with rdBase.BlockLogs(), rdBase.CaptureErrorLog() as log:
        try:
            mol = Chem.MolFromMolBlock(block)
        except (RuntimeError, ValueError, MemoryError) as error:
            mol, reason = None, _first_line(str(error))
    if mol is not None and mol.GetNumAtoms():
        return mol
    reason = reason or ("no atoms" if mol is not None else _parser_reason(log.messages))
    title = _first_line(block) or "without a title"
    raise DataError(f"record {title}", f"cannot be parsed ({reason})", "Correct it, or leave it out")


def canonicalize(smiles: str) -> str:
    """RDKit's canonical SMILES. Raises DataError where `smiles` cannot be parsed."""
    return _write(parse_smiles(smiles))


def mol_to_bytes(smiles: str | Mol) -> bytes:
    """A molecule as RDKit's own binary form (no properties), which `random_smiles` reads without parsing."""
    mol = parse_smiles(smiles) if isinstance(smiles, str) else smiles
    return mol.ToBinary(int(Chem.PropertyPickleOptions.NoProps))


def random_smiles(mol_bytes: bytes, count: int, seed: int) -> list[str]:
    """`count` random SMILES of a molecule: a pure function of its arguments, whatever was drawn before.

    `seed` is reduced to 1 .. 2^31 - 2: RDKit takes 0 as "go on with the stream of the process".

    Raises:
        DataError: bytes that are no RDKit molecule.
    """
    if count <= 0:
        return []
    try:
        mol = Chem.Mol(mol_bytes)  # type: ignore[call-overload]  # the stub says str
    except RuntimeError as error:
        found = f"the bytes are not a molecule ({_first_line(str(error))})"
        raise DataError("random SMILES of a stored molecule", found, "Build the token store again") from error
    if count > 1:  # once; else the writer does it anew for each of the strings
        Chem.AssignStereochemistry(mol, cleanIt=True)
    return list(Chem.MolToRandomSmilesVect(mol, count, randomSeed=1 + seed % (2**31 - 2)))


def scaffold(smiles: str | Mol) -> str:
    """The Bemis-Murcko scaffold as canonical SMILES without stereo marks; "" for an acyclic molecule."""
    from rdkit.Chem.Scaffolds import MurckoScaffold

    mol = parse_smiles(smiles) if isinstance(smiles, str) else smiles
    with rdBase.BlockLogs():
        return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(mol), isomericSmiles=False)


def inchikey(smiles: str | Mol) -> str:
    """The standard InChIKey; "" where InChI has none for this molecule (e.g. dummy atoms)."""
    mol = parse_smiles(smiles) if isinstance(smiles, str) else smiles
    with rdBase.BlockLogs():
        return Chem.MolToInchiKey(mol)


def clean_molecule(text: str, options: CleanOptions, is_mol_block: bool = False) -> CleanedMolecule:
    """Sanitise, strip or keep salts and atom maps, optionally neutralise and choose a tautomer, canonicalise.

    Of several fragments "strip" keeps the one with carbon, most heavy atoms, heaviest, in this order. Losses are
    told against the text of the kept fragment: a stereo mark on an atom that is no stereocentre counts as lost
    (RDKit drops it). A mol block is compared with the SMILES of the molecule that RDKit read from it.

    Raises:
        DataError: with RDKit's reason in `found`.
    """
    if is_mol_block:
        text = _write(parse_mol_block(text))
    changes: list[str] = []
    if "." in text:
        text, mol = _choose_fragment(text, options, changes)
    else:
        mol = parse_smiles(text)
    if "[" in text and any(atom_map for *_, atom_map in _BRACKET_ATOM.findall(text)):
        mol = _treat_atom_maps(mol, options, changes)
    if options.neutralize or options.canonical_tautomer:
        mol = _standardize(mol, options, changes)
    smiles = _write(mol)
    if "[" in text or "/" in text or "\\" in text:
        changes += _losses(text, smiles)
    return CleanedMolecule(smiles, mol, tuple(changes))


def _write(mol: Mol) -> str:
    return Chem.MolToSmiles(mol)


def _refusal(smiles: str) -> str:
    """Why a text is refused before RDKit sees it; "" where it is not."""
    if not smiles:
        return "it is empty"
    if len(smiles) > MAX_SMILES_CHARS:
        return f"{len(smiles)} characters, at most {MAX_SMILES_CHARS} are read"
    odd = _NOT_SMILES.search(smiles)
    if odd and smiles[odd.start() :].lstrip().startswith("|"):
        return "it carries a CXSMILES extension, which is not read"
    if odd:
        what = "white space" if odd[0].isspace() else f"character {odd[0]!a}"
        return f"{what} at position {odd.start() + 1}"
    if smiles.count(">") >= 2 and ("." in smiles or ">>" in smiles) and "->" not in smiles:
        return "a reaction, not a molecule"
    return ""


def _parser_reason(log: str) -> str:
    """The telling line of an RDKit error log, without time stamp and without the text itself."""
    lines = [line.split("] ", 1)[-1].strip() for line in log.splitlines() if line.startswith("[")]
    position = re.search(r"check for mistakes around position (\d+)", log)
    if position:
        return f"syntax error at position {position[1]}"
    first = next((line for line in lines if line), "RDKit gives no reason")
    first = first.removeprefix("SMILES Parse Error: ")
    return re.sub(r"\s+", " ", first.split(" for input:")[0].split(" while parsing:")[0])


def _choose_fragment(text: str, options: CleanOptions, changes: list[str]) -> tuple[str, Mol]:
    """The text and molecule to go on with: everything, or the fragment that is no salt."""
    whole = parse_smiles(text)
    if len(Chem.GetMolFrags(whole)) == 1:  # ring bonds may join what dots part
        return text, whole
    if options.salts == "keep":
        changes.append("salts_kept")
        return text, whole
    changes.append("salts_stripped")
    try:
        parts = [(part, parse_smiles(part)) for part in text.split(".")]
    except DataError:  # a ring bond crosses a dot: the parts are molecules only together
        parts = [(_write(mol), mol) for mol in Chem.GetMolFrags(whole, asMols=True)]
    return max(parts, key=lambda part: _fragment_rank(part[1]))


def _fragment_rank(mol: Mol) -> tuple[bool, int, float, str]:
    from rdkit.Chem.rdMolDescriptors import CalcExactMolWt

    has_carbon = any(atom.GetAtomicNum() == 6 for atom in mol.GetAtoms())
    return has_carbon, mol.GetNumHeavyAtoms(), round(CalcExactMolWt(mol), 3), _write(mol)


def _treat_atom_maps(mol: Mol, options: CleanOptions, changes: list[str]) -> Mol:
    if options.atom_maps == "keep":
        changes.append("atom_maps_kept")
        return mol
    changes.append("atom_maps_stripped")
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
    return parse_smiles(_write(mol))  # without their numbers, branches can become equal: stereo is found anew


def _standardize(mol: Mol, options: CleanOptions, changes: list[str]) -> Mol:
    from rdkit.Chem.MolStandardize import rdMolStandardize

    steps: list[tuple[bool, str, Any]] = [
        (options.neutralize, "neutralized", lambda m: rdMolStandardize.Uncharger().uncharge(m)),
        (
            options.canonical_tautomer,
            "tautomer_changed",
            lambda m: rdMolStandardize.TautomerEnumerator().Canonicalize(m),
        ),
    ]
    for wanted, change, step in steps:
        if not wanted:
            continue
        before = _write(mol)
        with rdBase.BlockLogs():
            try:
                mol = step(mol)
            except (RuntimeError, ValueError) as error:
                found = f"cannot be standardised ({_first_line(str(error))})"
                raise DataError(f'SMILES "{_shown(before)}"', found, f"Turn {change} off") from error
        after = _write(mol)
        if after != before:
            changes.append(change)
            mol = parse_smiles(after)
    return mol


def _losses(text: str, smiles: str) -> list[str]:
    """Which of stereo, charge and isotopes `text` spells and `smiles` no longer has."""
    lost = []
    if _num_stereo(text) > _num_stereo(smiles):
        lost.append("stereo_lost")
    charges, isotopes = _atom_counts(text)
    charges_after, isotopes_after = _atom_counts(smiles)
    if sum(charges) != sum(charges_after) or len(charges) > len(charges_after):
        lost.append("charge_changed")
    if isotopes > isotopes_after:
        lost.append("isotopes_lost")
    return lost


def _num_stereo(smiles: str) -> int:
    """Stereo centres and stereo double bonds that the text spells."""
    count = len(_CHIRAL_MARK.findall(smiles)) if "@" in smiles else 0
    if "/" not in smiles and "\\" not in smiles:
        return count
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles, sanitize=False)
    directed = {Chem.BondDir.ENDUPRIGHT, Chem.BondDir.ENDDOWNRIGHT}
    marked: set[int] = set()
    for bond in mol.GetBonds():
        if bond.GetBondDir() in directed:
            marked.update((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))
    double = (bond for bond in mol.GetBonds() if bond.GetBondType() == Chem.BondType.DOUBLE)
    return count + sum(bond.GetBeginAtomIdx() in marked and bond.GetEndAtomIdx() in marked for bond in double)


def _atom_counts(smiles: str) -> tuple[list[int], int]:
    """The charges that are not zero, and the number of isotope labels."""
    charges, isotopes = [], 0
    for isotope, _, signs, digits, _ in _BRACKET_ATOM.findall(smiles):
        isotopes += bool(isotope)
        if signs:
            size = int(digits) if digits else len(signs)
            if size:
                charges.append(size if signs[0] == "+" else -size)
    return charges, isotopes


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _shown(smiles: str, limit: int = 80) -> str:
    text = smiles.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]}..."
