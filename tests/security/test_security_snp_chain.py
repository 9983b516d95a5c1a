from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snp_machine import (
    AMD,
    MACHINES,
    NOW,
    ROLES,
    YEAR,
    SnpMachine,
    constraints,
    crl,
    ec_key,
    extension,
    ia5,
    integer,
    rsa_key,
    sequence,
    spki,
    table,
    usage,
)

from security.attestation.certificates import read_certificate
from security.attestation.collateral import Collateral
from security.attestation.errors import (
    SnpCertificateTableMalformed,
    SnpEndorsementMalformed,
)
from security.attestation.sev_snp import verify_endorsement, verify_sev_snp
from security.attestation.snp_certificate_table import parse_certificate_table
from security.attestation.snp_certificates import AMD_ROOTS
from security.attestation.snp_endorsement import read_endorsement
from security.attestation.snp_report import Product, SigningKey
from security.attestation.verdict import Verdict

VCEK, VLEK = MACHINES[0], MACHINES[1]
TURIN = MACHINES[4]


def codes(verdict: Verdict) -> list[str]:
    return [failure.code for failure in verdict.failures]


def message(verdict: Verdict) -> str:
    return " | ".join(str(failure) for failure in verdict.failures)


# -- VCEK and VLEK ----------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES, ids=lambda item: f"{item.product}-{item.key}")
def test_amds_extensions_are_read(machine: SnpMachine) -> None:
    endorsement = read_endorsement(read_certificate(machine.endorsement()))
    assert endorsement.product is Product(machine.product)
    assert endorsement.signing_key is SigningKey[machine.key]
    assert endorsement.tcb.to_bytes(endorsement.product) == machine.tcb
    assert endorsement.hwid == (machine.chip if machine.key == "VCEK" else b"")
    assert endorsement.csp_id == ("" if machine.key == "VCEK" else machine.csp_id)
    assert len(endorsement.chip_id) == (64 if machine.key == "VCEK" else 0)


def test_a_wrapped_hwid_is_read_too() -> None:
    wrapped = replace(
        VCEK,
        leaf_without=("4",),
        leaf_extensions=(extension(AMD + "4", b"\x04\x40" + VCEK.chip),),
    )
    assert read_endorsement(read_certificate(wrapped.endorsement())).hwid == VCEK.chip


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (replace(VCEK, leaf_without=("1",)), "structVersion"),
        (replace(VCEK, leaf_without=("2",)), "productName"),
        (replace(VCEK, leaf_without=("3.1",)), "bootloader"),
        (replace(VCEK, leaf_without=("3.8",)), "microcode"),
        (replace(VCEK, leaf_without=("3.4",)), "spl_4"),
        (replace(VCEK, leaf_without=("4",)), "hwID"),
        (replace(TURIN, leaf_without=("3.9",)), "fmc"),
        (replace(VLEK, leaf_without=("5",)), "csp_id"),
        (replace(VCEK, struct_version=2), "structVersion: expected 0 or 1"),
        (replace(VCEK, product_name="Venice"), "expected Milan, Genoa or Turin"),
        (replace(VCEK, product_name="Milan-"), "expected Milan, Genoa or Turin"),
        (replace(VCEK, product_name="xMilan"), "expected Milan, Genoa or Turin"),
        (replace(VCEK, hwid=b"\1" * 63), "hwID"),
        (replace(VCEK, hwid=bytes(64)), "hwID: expected a chip"),
        (replace(TURIN, hwid=b"\1" * 64), "hwID"),
        (
            replace(VCEK, leaf_without=("3.1",), leaf_extensions=(extension(AMD + "3.1", b""),)),
            "bootloader",
        ),
        (
            replace(
                VCEK,
                leaf_without=("3.1",),
                leaf_extensions=(extension(AMD + "3.1", integer(256)),),
            ),
            "0 to 255",
        ),
        (
            replace(
                VCEK,
                leaf_without=("3.1",),
                leaf_extensions=(extension(AMD + "3.1", integer(-1)),),
            ),
            "0 to 255",
        ),
        (
            replace(
                VCEK,
                leaf_without=("3.1",),
                leaf_extensions=(extension(AMD + "3.1", integer(1) + b"\0"),),
            ),
            "nothing more",
        ),
        (
            replace(
                VCEK, leaf_without=("3.4",), leaf_extensions=(extension(AMD + "3.4", integer(1)),)
            ),
            "spl_4: expected 0",
        ),
        (replace(VCEK, leaf_extensions=(extension(AMD + "5", ia5("CN=a")),)), "those of a VCEK"),
        (
            replace(VLEK, leaf_extensions=(extension(AMD + "4", VLEK.chip),)),
            "those of a VLEK",
        ),
        (replace(VCEK, leaf_extensions=(extension(AMD + "3.9", integer(0)),)), "those of a VCEK"),
        (replace(VCEK, leaf_extensions=(extension(AMD + "77", integer(0)),)), "those of a VCEK"),
        (replace(VLEK, csp_id="a\nb"), "printable"),
        (replace(VLEK, csp_id="a" * 257), "1 to 256"),
        (replace(VCEK, leaf_subject="SEV-XCEK"), "SEV-VCEK or SEV-VLEK"),
    ],
)
def test_extensions_that_amd_does_not_define_are_refused(
    machine: SnpMachine, expected: str
) -> None:
    with pytest.raises(SnpEndorsementMalformed, match=expected):
        read_endorsement(read_certificate(machine.endorsement()))


def test_evidence_with_only_such_a_certificate_is_refused_for_it() -> None:
    verdict = replace(VCEK, struct_version=2).verify()
    assert "snp_endorsement_malformed" in codes(verdict)
    assert "structVersion" in message(verdict)


# -- the chain --------------------------------------------------------------------------------


def test_no_certificate_is_a_failed_check() -> None:
    verdict = VCEK.verify(parts={"report": VCEK.report()})
    assert codes(verdict) == ["snp_endorsement_missing"]
    assert verdict.product == "Milan"


def test_nothing_at_all_is_a_failed_check() -> None:
    verdict = VCEK.verify(parts={"report": VCEK.report()}, collateral=Collateral())
    assert codes(verdict) == ["snp_endorsement_missing"]


def test_a_vlek_does_not_stand_in_for_a_vcek() -> None:
    verdict = VCEK.verify(
        parts=VCEK.parts() | {"certificates": table(("VLEK", VLEK.endorsement()))}
    )
    assert codes(verdict) == ["snp_endorsement_missing"]


def test_certificates_may_all_come_from_the_machine_or_all_from_the_operator() -> None:
    everything = table(("VCEK", VCEK.endorsement()), ("ASK", VCEK.issuer()), ("ARK", VCEK.root()))
    lists = (crl(),)
    verdict = VCEK.verify(
        parts={"report": VCEK.report(), "certificates": everything},
        collateral=Collateral((), lists),
    )
    assert verdict.holds
    certificates = (VCEK.root(), VCEK.endorsement(), VCEK.issuer())
    verdict = VCEK.verify(
        parts={"report": VCEK.report()}, collateral=Collateral(certificates, lists)
    )
    assert verdict.holds


def test_a_missing_issuer_is_a_failed_check() -> None:
    verdict = VCEK.verify(collateral=Collateral((VCEK.root(),), (crl(),)))
    assert codes(verdict) == ["snp_issuer_missing", "snp_revocation_unknown"]
    assert "SEV-Milan" in message(verdict)


def test_a_missing_root_is_a_failed_check() -> None:
    verdict = VCEK.verify(collateral=Collateral((VCEK.issuer(),), (crl(),)))
    assert codes(verdict) == ["snp_issuer_missing", "snp_revocation_unknown"]
    assert "ARK-Milan" in message(verdict)


def test_a_root_that_is_not_pinned_is_refused() -> None:
    verdict = VCEK.verify(roots=("0" * 64,))
    assert codes(verdict) == ["snp_root_not_trusted"]
    verdict = VCEK.verify(roots=())
    assert codes(verdict) == ["snp_root_not_trusted"]
    assert AMD_ROOTS[Product.MILAN][:16] in message(verdict)


def test_where_nothing_is_pinned_only_amds_roots_count() -> None:
    verdict = verify_sev_snp(VCEK.parts(), VCEK.collateral(), None, NOW, None)
    assert codes(verdict) == ["snp_root_not_trusted"]


@pytest.mark.parametrize(
    "machine",
    [
        replace(VCEK, leaf_signer="another"),
        replace(VCEK, issuer_signer="another"),
        replace(VCEK, root_signer="another"),
        replace(VCEK, issuer_key=spki(rsa_key("another"))),
    ],
)
def test_a_signature_by_another_key_is_refused(machine: SnpMachine) -> None:
    assert codes(machine.verify()) == ["snp_chain_signature_invalid"]


def test_a_vlek_under_the_ask_is_refused() -> None:
    machine = replace(VLEK, leaf_issuer="SEV-Milan", leaf_signer="VCEK")
    verdict = machine.verify(
        collateral=Collateral((VCEK.issuer(), VLEK.issuer(), VLEK.root()), (crl(),))
    )
    assert codes(verdict) == ["snp_certificate_profile"]
    assert "SEV-VLEK-Milan" in message(verdict)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (replace(VCEK, leaf_issuer="SEV-Genoa", issuer_subject="SEV-Genoa"), "SEV-Milan"),
        (replace(VCEK, leaf_key=spki(rsa_key("VLEK"))), "VCEK key: expected P-384"),
        (replace(VCEK, leaf_extensions=(constraints(),)), "no authority"),
        (replace(VCEK, leaf_extensions=(extension("1.2.3", b"", True),)), "no other critical"),
        (replace(VCEK, issuer_extensions=(usage(5),)), "ASK basicConstraints: expected CA"),
        (replace(VCEK, issuer_extensions=(constraints(), usage(5))), "pathLenConstraint"),
        (replace(VCEK, issuer_extensions=(constraints(1), usage(5))), "pathLenConstraint"),
        (replace(VCEK, issuer_extensions=(constraints(0),)), "ASK keyUsage"),
        (replace(VCEK, issuer_extensions=(constraints(0), usage(0))), "ASK keyUsage"),
        (
            replace(VCEK, issuer_extensions=(constraints(0), extension("2.5.29.15", b""))),
            "readable ones",
        ),
        (
            replace(
                VCEK,
                issuer_extensions=(constraints(0), usage(5), extension("2.5.29.30", b"", True)),
            ),
            "no other critical",
        ),
        (replace(VCEK, root_extensions=(constraints(), usage(5))), "ARK keyUsage"),
        (replace(VCEK, root_extensions=(usage(5, 6),)), "ARK basicConstraints"),
    ],
)
def test_certificates_that_are_not_as_amd_specifies_are_refused(
    machine: SnpMachine, expected: str
) -> None:
    verdict = machine.verify()
    assert "snp_certificate_profile" in codes(verdict)
    assert expected in message(verdict)


def test_an_rsa_key_of_another_length_signs_nothing() -> None:
    machine = replace(VCEK, issuer_key=spki(rsa_key("short", 2048)))
    assert codes(machine.verify()) == ["snp_chain_signature_invalid", "snp_certificate_profile"]


@pytest.mark.parametrize("field", ["leaf_dates", "issuer_dates", "root_dates"])
def test_every_certificate_is_judged_at_its_dates(field: str) -> None:
    machine = replace(VCEK, **{field: (NOW - 10, NOW + 10)})  # type: ignore[arg-type]
    assert machine.verify(now=NOW - 10).holds
    assert machine.verify(now=NOW + 10).holds
    assert codes(machine.verify(now=NOW - 11)) == ["snp_certificate_not_yet_valid"]
    assert codes(machine.verify(now=NOW + 11)) == ["snp_certificate_expired"]


# -- decoys -----------------------------------------------------------------------------------


def decoys() -> tuple[bytes, ...]:
    """Certificates with the right names that prove nothing, and some of others."""
    return (
        b"no certificate",
        replace(VCEK, leaf_signer="another").endorsement(),
        replace(VCEK, leaf_key=spki(ec_key("another"))).endorsement(),
        replace(VCEK, leaf_dates=(NOW - 10, NOW - 5)).endorsement(),
        replace(VCEK, struct_version=2).endorsement(),
        replace(VCEK, hwid=b"\7" * 64).endorsement(),
        replace(VCEK, certified_tcb=bytes(8)).endorsement(),
        replace(VCEK, issuer_key=spki(rsa_key("another"))).issuer(),
        replace(VCEK, issuer_signer="another").issuer(),
        replace(VCEK, issuer_dates=(NOW - 10, NOW - 5)).issuer(),
        replace(VCEK, issuer_serial=0x666).issuer(),
        replace(VCEK, root_serial=1).root(),
        *(item for machine in MACHINES[1:] for item in (machine.endorsement(), machine.issuer())),
        *(machine.root() for machine in MACHINES[2:]),
    )


@given(st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_decoys_do_not_hide_the_real_chain(order: Random) -> None:
    pool = [*decoys(), VCEK.endorsement(), VCEK.issuer(), VCEK.root()]
    order.shuffle(pool)
    verdict = VCEK.verify(
        parts={"report": VCEK.report()},
        collateral=Collateral(tuple(pool), (crl(revoked=(0x666,)),)),
    )
    assert verdict.holds, message(verdict)
    assert "1 certificates could not be read and were ignored" in verdict.notes


def test_decoys_alone_are_refused() -> None:
    pool = tuple(item for item in decoys() if item not in (VCEK.issuer(), VCEK.root()))
    verdict = VCEK.verify(parts={"report": VCEK.report()}, collateral=Collateral(pool, (crl(),)))
    assert not verdict.holds


# -- revocation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("serial", "role"), [(0x10001, "ASK"), (0x10000, "ARK")])
@pytest.mark.parametrize("opened", [(), ("revocation",)])
def test_an_entry_revokes_issuer_and_root_whatever_is_open(
    serial: int, role: str, opened: tuple[str, ...]
) -> None:
    collateral = Collateral((VCEK.issuer(), VCEK.root()), (crl(revoked=(serial,)),))
    verdict = VCEK.verify(collateral=collateral, open=opened)
    assert codes(verdict) == ["snp_certificate_revoked"]
    assert f"found {role}" in message(verdict)


def test_an_entry_counts_even_in_a_list_that_is_out_of_date_beside_a_current_one() -> None:
    old = crl(revoked=(0x10001,), this_update=NOW - 9000, next_update=NOW - 8000)
    future = crl(revoked=(0x10001,), this_update=NOW + 8000, next_update=NOW + 9000)
    for other in (old, future):
        verdict = VCEK.verify(collateral=Collateral((VCEK.issuer(), VCEK.root()), (crl(), other)))
        assert codes(verdict) == ["snp_certificate_revoked"]


def test_serial_number_0_names_no_vcek() -> None:
    lists = (crl(revoked=(0,)),)
    assert VCEK.verify(collateral=Collateral((VCEK.issuer(), VCEK.root()), lists)).holds


@pytest.mark.parametrize(
    "lists",
    [
        (),
        (b"no list",),
        (crl("Genoa"),),
        (crl(signer="another"),),
        (crl(this_update=NOW - 9, next_update=NOW - 1),),
        (crl(this_update=NOW + 1, next_update=NOW + 9),),
        (crl(next_update=None),),
        (crl(extensions=(extension("2.5.29.28", sequence(), True),)),),
    ],
    ids=["none", "unreadable", "other root", "forged", "stale", "future", "endless", "critical"],
)
def test_without_a_current_list_revocation_is_unknown(lists: tuple[bytes, ...]) -> None:
    collateral = Collateral((VCEK.issuer(), VCEK.root()), lists)
    assert codes(VCEK.verify(collateral=collateral)) == ["snp_revocation_unknown"]
    verdict = VCEK.verify(collateral=collateral, open=("revocation",))
    assert verdict.holds
    assert any("revocation was" in note for note in verdict.notes)


def test_a_forged_list_revokes_nothing() -> None:
    lists = (crl(), crl(revoked=(0x10001,), signer="another"))
    assert VCEK.verify(collateral=Collateral((VCEK.issuer(), VCEK.root()), lists)).holds


def test_first_and_last_second_of_a_list_count() -> None:
    collateral = Collateral(
        (VCEK.issuer(), VCEK.root()), (crl(this_update=NOW, next_update=NOW + 1),)
    )
    assert VCEK.verify(collateral=collateral, now=NOW).holds
    assert VCEK.verify(collateral=collateral, now=NOW + 1).holds
    assert not VCEK.verify(collateral=collateral, now=NOW + 2).holds


# -- a certificate alone ----------------------------------------------------------------------


def lone(machine: SnpMachine, roots: tuple[str, ...] | None = None) -> Verdict:
    known = (hashlib.sha256(machine.root()).hexdigest(),) if roots is None else roots
    return verify_endorsement(machine.endorsement(), machine.collateral(), NOW, known)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda item: f"{item.product}-{item.key}")
def test_a_certificate_alone_is_judged(machine: SnpMachine) -> None:
    verdict = lone(machine)
    assert verdict.holds
    assert verdict.kind == "sev-snp-certificate"
    assert verdict.measurement == ""
    assert "no machine proved anything" in verdict.notes[0]


def test_a_certificate_alone_is_refused_by_the_same_checks() -> None:
    assert codes(lone(VCEK, roots=())) == ["snp_root_not_trusted"]
    assert codes(lone(replace(VCEK, leaf_signer="another"))) == ["snp_chain_signature_invalid"]
    expired = replace(VCEK, leaf_dates=(NOW - YEAR, NOW - 1))
    assert codes(lone(expired)) == ["snp_certificate_expired"]
    with pytest.raises(SnpEndorsementMalformed):
        lone(replace(VCEK, struct_version=2))


# -- the certificate table --------------------------------------------------------------------


def test_a_table_is_read() -> None:
    other = "ecae0c0f-9502-43b1-afa2-0ae2e0d565b6"
    entries = (("VCEK", b"v"), ("VLEK", b"l"), ("ASK", b"a"), ("ARK", b"r"), (other, b"?"))
    assert parse_certificate_table(table(*entries)) == entries
    assert parse_certificate_table(table()) == ()
    assert parse_certificate_table(b"") == ()


def test_guids_stand_in_the_order_of_their_text() -> None:
    assert table(("VCEK", b"v")).startswith(bytes.fromhex(ROLES["VCEK"].replace("-", "")))


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        bytes(23),
        b"\1" * 24,
        table(("VCEK", b"v"))[:24],
        table(("VCEK", b"v"))[:-1],
        table(("VCEK", b"")),
        b"\1" * 16 + bytes(4) + b"\1\0\0\0" + bytes(24),
        b"\1" * 16 + b"\xff" * 8 + bytes(24),
        table(*(("VCEK", b"v"),) * 17),
        bytes((256 << 10) + 1),
    ],
    ids=[
        "short",
        "almost",
        "endless",
        "no end",
        "beyond",
        "empty",
        "into the header",
        "overflow",
        "many",
        "long",
    ],
)
def test_a_table_that_points_outside_is_refused(data: bytes) -> None:
    with pytest.raises(SnpCertificateTableMalformed):
        parse_certificate_table(data)
    with pytest.raises(SnpCertificateTableMalformed):
        VCEK.verify(parts={"report": VCEK.report(), "certificates": data})


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_tables_raise_only_named_errors(data: bytes) -> None:
    try:
        found = parse_certificate_table(data)
    except SnpCertificateTableMalformed:
        return
    assert sum(len(octets) for _, octets in found) <= 16 * len(data)


def test_no_warning_is_emitted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for machine in MACHINES:
            assert machine.verify().holds
