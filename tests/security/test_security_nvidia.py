"""Every rule of kind "nvidia" on evidence that is made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia_machine import (
    DRIVER,
    NONCE,
    NOW,
    SWITCH_VBIOS,
    VBIOS,
    YEAR,
    Device,
    Issued,
    Machine,
    authorities,
    collateral,
    digest,
    driver_manifest,
    expectations,
    gpu,
    issue,
    machine,
    new_key,
    references,
    revocation_list,
    serial_of,
    soundness,
    switch,
    tcb_info,
    vbios_manifest,
)

from placement.requirements import PINS, RELAXATIONS
from security.attestation import (
    nvidia,
    nvidia_certificates,
    nvidia_device,
    nvidia_references,
)
from security.attestation.collateral import Collateral
from security.attestation.errors import CertificateUnsupported
from security.attestation.nvidia import verify_nvidia
from security.attestation.verdict import Expectations, Verdict
from security.errors import AppraisalError, EvidenceMalformed


def codes(verdict: Verdict) -> set[str]:
    return {failure.code for failure in verdict.failures}


def failing(verdict: Verdict) -> set[str]:
    """Names of the rules that do not hold, of the set and of every device."""
    return {
        check.name
        for one in (verdict, *verdict.devices)
        for check in one.checks
        if check.failure is not None
    }


def judged(
    devices: Sequence[Device],
    expected: Expectations | None = None,
    papers: Collateral | None = None,
    now: int = NOW,
    bound_to: bytes | None = NONCE,
) -> Verdict:
    return verify_nvidia(
        Machine(tuple(devices)).parts(),
        collateral() if papers is None else papers,
        expected or expectations(devices),
        now,
        bound_to,
    )


def test_a_gpu_is_accepted_with_nothing_open() -> None:
    device = gpu()
    verdict = judged([device])
    verdict.require()
    assert verdict.holds and verdict.notes == ()
    assert (verdict.kind, verdict.product) == ("nvidia", "Hopper")
    assert verdict.identity == serial_of(device)
    (one,) = verdict.devices
    assert (one.kind, one.product, one.notes) == ("nvidia-gpu", "Hopper", ())
    assert (one.fields["driver"], one.fields["vbios"]) == (DRIVER, VBIOS)
    assert one.fields["pdi"] == device.pdi.hex()


def test_eight_gpus_and_four_switches_are_accepted_with_nothing_open() -> None:
    verdict = judged(machine(8, 4).devices)
    verdict.require()
    assert [one.kind for one in verdict.devices] == ["nvidia-gpu"] * 8 + ["nvidia-switch"] * 4
    assert verdict.devices[8].fields["vbios"] == SWITCH_VBIOS
    assert verdict.fields == {"gpus": "8", "switches": "4"}


def test_a_blackwell_gpu_has_its_own_references() -> None:
    device = gpu(chip="GB100")
    papers = collateral(
        rims=references(
            driver_manifest(device, product="GB100"), vbios_manifest(device, product="GB100")
        )
    )
    expected = expectations([device])
    pins = {**expected.requirements.pins, "architecture": ("Blackwell",)}
    expected = replace(expected, requirements=replace(expected.requirements, pins=pins))
    judged([device], expected, papers).require()
    assert codes(judged([device], expected)) == {"rim_missing"}


def test_every_pin_and_relaxation_is_used() -> None:
    rules = (
        *nvidia_device.POLICY_RULES,
        *nvidia.SET_POLICY_RULES,
    )
    pins = {rule.name.removeprefix("nvidia.pin.") for rule in rules if ".pin." in rule.name}
    assert pins == set(PINS["nvidia"])
    assert set(RELAXATIONS["nvidia"]) == {
        "freshness",
        "revocation",
        "fwid",
        "driver_rim",
        "vbios_rim",
        "topology",
    }


def test_rules_have_distinct_names_and_sources() -> None:
    rules = [
        *nvidia_device.SOUNDNESS_RULES,
        *nvidia_device.POLICY_RULES,
        *nvidia_references.REFERENCE_RULES,
        *nvidia_references.REFERENCE_POLICY_RULES,
        *nvidia.SET_RULES,
        *nvidia.SET_POLICY_RULES,
    ]
    assert len({rule.name for rule in rules}) == len(rules)
    assert all(rule.name.startswith("nvidia.") and rule.source for rule in rules)


def measuring_nvdec0(device: Device) -> Device:
    """The same with the measurement that only counts where NVDEC0 is on."""
    return device.measuring(35, digest("not measured while NVDEC0 is off"))


# -- the report -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "rule", "code"),
    [
        (lambda one: replace(one, param1=0), "nvidia.request", "nvidia_request_refused"),
        (lambda one: replace(one, param2=1), "nvidia.request", "nvidia_request_refused"),
        (
            lambda one: replace(one, key=new_key()),
            "nvidia.report.signature",
            "nvidia_report_signature_invalid",
        ),
        (
            lambda one: one.saying(FWID=digest("other")),
            "nvidia.report.fwid",
            "nvidia_fwid_mismatch",
        ),
        (
            lambda one: one.saying(FWID=None),
            "nvidia.report.fwid_present",
            "nvidia_fwid_missing",
        ),
        (
            lambda one: measuring_nvdec0(one.saying(NVDEC0_STATUS=None)),
            "nvidia.report.opaque_present",
            "nvidia_opaque_data_missing",
        ),
        (
            lambda one: measuring_nvdec0(one.saying(NVDEC0_STATUS=b"\x00")),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(PROTECTED_PCIE_STATUS=b"\x01"),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(PROTECTED_PCIE_STATUS=b"\x55\x55"),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(OPAQUE_DATA_VERSION=b"\x02\x00"),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(FEATURE_FLAG=b"\x03\x00"),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(FEATURE_FLAG=b"\x02\x00"),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(SWITCH_PDI=bytes(9)),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.saying(SWITCH_PDI=bytes(8 * 65)),
            "nvidia.report.opaque_known",
            "nvidia_opaque_data_refused",
        ),
        (
            lambda one: one.measuring(22, digest("other")),
            "nvidia.rim.driver",
            "rim_mismatch",
        ),
        (lambda one: one.measuring(9, digest("other")), "nvidia.rim.vbios", "rim_mismatch"),
        (
            lambda one: replace(one, blocks=one.blocks[:22]),
            "nvidia.rim.driver",
            "rim_mismatch",
        ),
    ],
)
def test_one_thing_wrong_in_a_report(
    change: Callable[[Device], Device], rule: str, code: str
) -> None:
    verdict = judged([change(gpu())])
    assert (failing(verdict), codes(verdict)) == ({rule}, {code})


@pytest.mark.parametrize("value", [b"", bytes(7), b"\0\xaa\0\x96\x01\0\0\1"])
def test_a_vbios_version_of_another_shape(value: bytes) -> None:
    verdict = judged([gpu().saying(VBIOS_VERSION=value)])
    assert "nvidia.report.opaque_known" in failing(verdict)


def test_a_driver_version_of_another_shape() -> None:
    verdict = judged([gpu().saying(DRIVER_VERSION=b"570 00")])
    assert "nvidia.report.opaque_known" in failing(verdict)


def test_an_alternative_measurement_will_do() -> None:
    judged([gpu().measuring(9, digest("older"))]).require()


def test_nvdec0_is_measured_where_it_is_on() -> None:
    device = gpu().saying(NVDEC0_STATUS=b"\xaa")
    assert failing(judged([device])) == {"nvidia.rim.driver"}
    judged([measuring_nvdec0(device)]).require()


def test_a_firmware_id_without_one_in_the_leaf() -> None:
    device = gpu()
    made = authorities()
    boot = device.chain[1]
    leaf = issue("GH100 A01 GSP FMC LF", boot, authority=False)
    changed = replace(device, chain=(leaf, *device.chain[1:]))
    assert made.root in changed.chain
    assert codes(judged([changed])) == {"nvidia_fwid_mismatch"}


def test_what_may_be_open_for_old_firmware() -> None:
    device = gpu().saying(FWID=None)
    verdict = judged([device], expectations([device], open=("fwid",)))
    verdict.require()
    assert any("no FWID" in note for note in verdict.devices[0].notes)


# -- freshness --------------------------------------------------------------------------------


def test_freshness() -> None:
    device = gpu()
    assert codes(judged([device], bound_to=b"x" * 32)) == {"nvidia_nonce_mismatch"}
    assert codes(judged([device], bound_to=None)) == {"freshness_unproven"}
    opened = expectations([device], open=("freshness",))
    for bound_to in (None, b"x" * 32):
        verdict = judged([device], opened, bound_to=bound_to)
        verdict.require()
        assert verdict.notes == ("freshness was not judged",)


def test_nonces_of_two_challenges() -> None:
    one, other = machine(2, 0).devices
    parts = {**one.parts(), **other.parts(b"y" * 32)}
    verdict = verify_nvidia(parts, collateral(), expectations([one, other]), NOW, NONCE)
    assert codes(verdict) == {"nvidia_nonces_differ", "nvidia_nonce_mismatch"}
    opened = expectations([one, other], open=("freshness",))
    assert codes(verify_nvidia(parts, collateral(), opened, NOW, None)) == {"nvidia_nonces_differ"}


# -- the chain --------------------------------------------------------------------------------


def with_chain(device: Device, chain: Sequence[Issued]) -> Device:
    return replace(device, chain=tuple(chain), key=device.leaf.key)


@pytest.mark.parametrize(
    "left", [[4], [0, 1, 2, 3], [0, 1, 3, 4], [1, 2, 3, 4], [0], [0, 0, 1, 2, 3, 4]]
)
def test_missing_or_extra_certificates(left: list[int]) -> None:
    device = gpu()
    verdict = judged([with_chain(device, [device.chain[i] for i in left])])
    assert "nvidia_chain_length" in codes(verdict)


def test_wrong_order() -> None:
    device = gpu()
    a, b, c, d, e = device.chain
    for chain in ([a, c, b, d, e], [b, a, c, d, e], [e, d, c, b, a], [a, b, d, c, e]):
        assert "nvidia_chain_broken" in codes(judged([with_chain(device, chain)]))


def test_a_chain_of_another_device() -> None:
    device, other = gpu(), gpu()
    mixed = [device.chain[0], *other.chain[1:]]
    assert {"nvidia_chain_broken"} <= codes(judged([with_chain(device, mixed)]))
    changed = judged([replace(device, chain=other.chain, key=device.leaf.key)])
    assert "nvidia_report_signature_invalid" in codes(changed)


def test_a_decoy_root_of_the_same_name() -> None:
    device = gpu()
    decoy = issue("Device Root", None)
    swapped = with_chain(device, [*device.chain[:4], decoy])
    assert codes(judged([swapped], expectations([swapped], open=("revocation",)))) == {
        "nvidia_chain_broken",
        "nvidia_root_not_pinned",
    }
    identity = issue("GH100 Identity", decoy, listed=True)
    provisioner = issue("GH100 Provisioner ICA 1", identity, listed=True)
    boot = issue("GH100 A01 GSP BROM", provisioner)
    leaf = issue(
        "GH100 A01 GSP FMC LF",
        boot,
        authority=False,
        extensions=[(tcb_info(digest("firmware")), False)],
    )
    whole = replace(device, chain=(leaf, boot, provisioner, identity, decoy))
    expected = expectations([whole], open=("revocation",))
    assert codes(judged([whole], expected)) == {"nvidia_root_not_pinned"}


def test_the_vendor_root_is_pinned_without_a_policy() -> None:
    verdict = verify_nvidia(gpu().parts(), Collateral(), None, NOW, NONCE)
    assert codes(verdict) == {"nvidia_root_not_pinned"}


@pytest.mark.parametrize("now", [NOW - 2 * YEAR, NOW + 2 * YEAR])
def test_dates(now: int) -> None:
    device = gpu()
    verdict = judged([device], expectations([device], open=("revocation", "driver_rim")), now=now)
    assert "nvidia_certificate_not_current" in codes(verdict)


def rebuilt(boot: Issued, leaf: Issued) -> Device:
    made = authorities()
    return replace(gpu(), chain=(leaf, boot, made.provisioner, made.identity, made.root))


def leaf_under(boot: Issued, **changes: object) -> Issued:
    settings_ = {
        "authority": False,
        "extensions": [(tcb_info(digest("firmware")), False)],
        **changes,
    }
    return issue("GH100 A01 GSP FMC LF", boot, **settings_)


def test_who_may_issue_and_who_may_sign() -> None:
    made = authorities()
    plain = issue("GH100 A01 GSP BROM", made.provisioner, authority=False)
    boot = issue("GH100 A01 GSP BROM", made.provisioner)
    short = issue("GH100 Identity", made.root, path_length=0, listed=True)
    provisioner = issue("GH100 Provisioner ICA 1", short, listed=True)
    under = issue("GH100 A01 GSP BROM", provisioner)
    for device in (
        rebuilt(plain, leaf_under(plain)),
        rebuilt(boot, leaf_under(boot, authority=True)),
        rebuilt(boot, leaf_under(boot, signs_data=False)),
        replace(gpu(), chain=(leaf_under(under), under, provisioner, short, made.root)),
    ):
        papers = collateral(crls=(*made.lists(), revocation_list(short)))
        assert codes(judged([device], papers=papers)) == {"nvidia_chain_not_authorised"}


def test_other_keys_algorithms_and_critical_extensions() -> None:
    boot = issue("GH100 A01 GSP BROM", authorities().provisioner)
    policy = x509.PolicyConstraints(require_explicit_policy=0, inhibit_policy_mapping=None)
    for leaf in (
        leaf_under(boot, curve=ec.SECP256R1()),
        leaf_under(boot, hash_algorithm=SHA256()),
        leaf_under(boot, extensions=[(policy, True)]),
        leaf_under(
            boot,
            extensions=[
                (
                    x509.UnrecognizedExtension(
                        x509.ObjectIdentifier("2.23.133.5.4.1"), b"\x30\x00"
                    ),
                    False,
                )
            ],
        ),
    ):
        chain = b"".join(item.der for item in (leaf, boot))
        parts = {**gpu().parts(), "gpu.0.chain": chain}
        with pytest.raises(CertificateUnsupported):
            verify_nvidia(parts, Collateral(), soundness(), NOW, None)


@pytest.mark.parametrize("octet", [0x00, 0x80])
def test_serial_numbers_that_are_not_positive(octet: int) -> None:
    made = authorities()
    odd = issue("GH100 Provisioner ICA 1", made.identity, serial=0x11).der
    assert odd.count(b"\x02\x01\x11") == 1
    odd = odd.replace(b"\x02\x01\x11", bytes([2, 1, octet]))
    chain = [item.der for item in gpu().chain]
    chain[2] = odd
    parts = {**gpu().parts(), "gpu.0.chain": b"".join(chain)}
    with pytest.raises(CertificateUnsupported, match="serial number"):
        verify_nvidia(parts, collateral(), soundness(), NOW, None)


def test_names_of_chips() -> None:
    made = authorities()
    boot = issue("GA100 A01 GSP BROM", made.provisioner)
    unknown = rebuilt(boot, issue("GA100 A01 GSP FMC LF", boot, authority=False))
    assert "nvidia_architecture_refused" in codes(judged([unknown]))
    boot = issue("GB100 A01 GSP BROM", made.provisioner)
    assert codes(judged([rebuilt(boot, leaf_under(boot))])) == {"nvidia_architecture_refused"}
    for device in (
        replace(switch(), name="gpu.0"),
        replace(gpu(), name="switch.0"),
    ):
        verdict = judged([gpu("gpu.1"), device])
        assert "nvidia_architecture_refused" in codes(verdict)


def test_a_root_of_devices_signs_no_manifest_and_the_other_way_round() -> None:
    made = authorities()
    device = gpu()
    # Whoever holds the key of a device's leaf, or of anything else under the device root, ...
    authority = issue("Reference Value L3", made.root)
    signer = issue("RIM L4 Signer", authority, authority=False)
    chain = (signer, authority, made.root)
    papers = collateral(
        rims=references(
            replace(driver_manifest(device), chain=chain),
            replace(vbios_manifest(device), chain=chain),
        )
    )
    assert codes(judged([device], papers=papers)) == {"rim_missing", "rim_unusable"}
    # ... and whoever holds one under the RIM root.
    identity = issue("GH100 Identity", made.rim_root)
    provisioner = issue("GH100 Provisioner ICA 1", identity)
    boot = issue("GH100 A01 GSP BROM", provisioner)
    leaf = leaf_under(boot)
    other = replace(device, chain=(leaf, boot, provisioner, identity, made.rim_root))
    assert codes(judged([other])) == {"nvidia_root_not_pinned"}
    # The vendor's roots count where a policy names none of a sort.
    expected = expectations([device], rim_roots=())
    assert codes(judged([device], expected)) == {"rim_missing", "rim_unusable"}
    expected = expectations([device], roots=())
    assert codes(judged([device], expected)) == {"nvidia_root_not_pinned"}


# -- revocation -------------------------------------------------------------------------------


def test_lists_of_issuers_that_somebody_made_up_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bytes] = []

    def list_of(issuer: bytes, data: bytes) -> None:
        asked.append(issuer)

    monkeypatch.setattr(nvidia_certificates, "_list_of", list_of)
    device, made = gpu(), authorities()
    decoy = issue("Device Root", None)
    identity = issue("GH100 Identity", decoy, listed=True)
    provisioner = issue("GH100 Provisioner ICA 1", identity, listed=True)
    boot = issue("GH100 A01 GSP BROM", provisioner)
    lists = (*made.lists(), *(revocation_list(item) for item in (decoy, identity, provisioner)))
    below = device.chain[1]
    not_authorised = leaf_under(below)
    for chain in (
        (leaf_under(boot), boot, provisioner, identity, decoy),
        (leaf_under(boot), boot, provisioner, identity, made.root),
        (*device.chain[:4], decoy),
        (leaf_under(not_authorised), not_authorised, *device.chain[1:4]),
        (leaf_under(not_authorised), not_authorised, *device.chain[2:]),
    ):
        found = replace(device, chain=chain)
        for expected in (expectations([found]), expectations([found], open=("revocation",))):
            verdict = judged([found], expected, collateral(crls=lists))
            assert not verdict.holds
            assert any("revocation was not judged" in note for note in verdict.devices[0].notes)
    assert asked == []
    judged([device], papers=collateral(crls=lists))
    assert asked


def test_lists_of_those_who_sign_manifests() -> None:
    made, device = authorities(), gpu()
    top = issue("Reference Value CA", made.rim_root, listed=True)
    signer = issue("RIM L4 Signer", top, authority=False)
    chain = (signer, top, made.rim_root)
    rims = references(
        replace(driver_manifest(device), chain=chain), replace(vbios_manifest(device), chain=chain)
    )

    def with_lists(*lists: bytes, **changes: object) -> Verdict:
        papers = collateral(rims=rims, crls=(*made.lists(), *lists))
        return judged([device], expectations([device], **changes), papers)

    unusable = {"rim_missing", "rim_unusable"}
    for lists in (
        (),
        (revocation_list(made.rim_root, end=NOW - 1),),
        (revocation_list(made.rim_root, key=new_key()),),
    ):
        verdict = with_lists(*lists)
        assert codes(verdict) == unusable
        assert any("nvidia_revocation_unknown" in str(item) for item in verdict.failures)
    verdict = with_lists(revocation_list(made.rim_root))
    verdict.require()
    assert verdict.devices[0].notes == ()
    revoked = revocation_list(made.rim_root, [top.certificate.serial_number])
    assert codes(with_lists(revoked)) == unusable
    assert codes(with_lists(revoked, open=("revocation",))) == unusable
    opened = with_lists(open=("revocation",))
    opened.require()
    assert any("revocation was not judged: signer of RIM" in n for n in opened.devices[0].notes)


def test_each_list_is_parsed_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    load = x509.load_der_x509_crl

    def count(data: bytes) -> x509.CertificateRevocationList:
        parsed.append(data)
        return load(data)

    monkeypatch.setattr(x509, "load_der_x509_crl", count)
    made = authorities()
    strangers = tuple(revocation_list(issue(f"Stranger {i}", None)) for i in range(8))
    lists = (revocation_list(made.root), revocation_list(made.identity), *strangers)
    devices = machine(8, 4).devices
    judged(devices, papers=collateral(crls=lists)).require()
    # Once for the name of its issuer, and once more for those of the chains' authorities.
    assert len(parsed) <= len(lists) + 2


def test_revocation_lists() -> None:
    device = gpu()
    made = authorities()
    expected = expectations([device])
    root_list, identity_list = made.lists()

    def with_lists(*lists: bytes, now: int = NOW) -> set[str]:
        return codes(judged([device], expected, collateral(crls=lists), now=now))

    assert with_lists(root_list, identity_list) == set()
    unknown = {"nvidia_revocation_unknown"}
    assert with_lists() == unknown
    assert with_lists(root_list) == unknown
    assert with_lists(b"not a list", identity_list) == unknown
    other_version = root_list.replace(b"\x02\x01\x01", b"\x02\x01\x09", 1)
    assert other_version != root_list
    assert with_lists(other_version, identity_list) == unknown
    assert with_lists(root_list, revocation_list(made.identity, end=NOW - 1)) == unknown
    assert with_lists(root_list, revocation_list(made.identity, start=NOW + 1)) == unknown
    assert with_lists(root_list, revocation_list(made.identity, key=new_key())) == unknown
    partial = x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    for extension in (partial, x509.DeltaCRLIndicator(1)):
        listing = revocation_list(made.identity, extensions=[(extension, True)])
        assert with_lists(root_list, listing) == unknown
    listing = revocation_list(made.identity, extensions=[(x509.CRLNumber(1), False)])
    assert with_lists(root_list, listing) == set()
    serial = made.provisioner.certificate.serial_number
    revoked = revocation_list(made.identity, [serial])
    assert with_lists(root_list, revoked) == {"nvidia_certificate_revoked"}
    old = revocation_list(made.identity, [serial], end=NOW - 1)
    assert with_lists(root_list, old, identity_list) == {"nvidia_certificate_revoked"}
    opened = expectations([device], open=("revocation",))
    verdict = judged([device], opened, collateral(crls=()))
    verdict.require()
    assert any("revocation was not judged" in note for note in verdict.devices[0].notes)


def test_the_policy_revokes_any_certificate_of_the_chain() -> None:
    device = gpu()
    boot = f"{device.chain[1].certificate.serial_number:x}"
    for serial in (serial_of(device), boot):
        verdict = judged([device], expectations([device], revoked=(serial,)))
        assert codes(verdict) == {"revoked_identity"}


# -- pins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pin", "value"),
    [
        ("architecture", "Blackwell"),
        ("driver", "550.00"),
        ("vbios", "96.00.00.00.01"),
        ("device", "00ff"),
        ("gpus", "8"),
        ("switches", "4"),
    ],
)
def test_pins(pin: str, value: str) -> None:
    device = gpu()
    pins = dict(expectations([device]).requirements.pins)
    refused = judged([device], expectations([device], pins={**pins, pin: (value,)}))
    assert (codes(refused), failing(refused)) == ({"pin_refused"}, {f"nvidia.pin.{pin}"})
    del pins[pin]
    assert codes(judged([device], expectations([device], pins=pins))) == {"pin_missing"}
    judged([device], expectations([device], pins=pins, open=(pin,))).require()


def test_measurements_of_the_policy_are_not_ignored() -> None:
    device = gpu()
    pinned = replace(expectations([device]), measurements=("00" * 48,))
    assert codes(judged([device], pinned)) == {"measurement_refused"}
    judged([device], replace(pinned, measurements=())).require()


# -- references -------------------------------------------------------------------------------


def test_both_references_are_required() -> None:
    device = gpu()
    driver, vbios = references(driver_manifest(device), vbios_manifest(device))
    for papers, rule, name in (
        ((driver,), "nvidia.rim.vbios_present", "vbios_rim"),
        ((vbios,), "nvidia.rim.driver_present", "driver_rim"),
    ):
        verdict = judged([device], papers=collateral(rims=papers))
        assert (failing(verdict), codes(verdict)) == ({rule}, {"rim_missing"})
        opened = expectations([device], open=(name,))
        judged([device], opened, collateral(rims=papers)).require()


def test_a_reference_that_contradicts_is_not_left_open() -> None:
    device = gpu().measuring(22, digest("other"))
    opened = expectations([device], open=("driver_rim", "vbios_rim"))
    assert codes(judged([device], opened)) == {"rim_mismatch"}


def test_references_that_differ_are_no_alternatives() -> None:
    device = gpu()
    other = driver_manifest(device.measuring(22, digest("other")))
    good = (driver_manifest(device), vbios_manifest(device))
    for rims in ((other, *good), (*good, other)):
        papers = collateral(rims=references(*rims))
        assert codes(judged([device], papers=papers)) == {"rim_mismatch"}
    judged([device], papers=collateral(rims=references(*good, driver_manifest(device)))).require()


def test_references_for_others_are_no_candidates() -> None:
    device = gpu()
    papers = collateral(
        rims=references(
            driver_manifest(device, version="550.00"), vbios_manifest(device, product="GB100")
        )
    )
    verdict = judged([device], expectations([device], open=("driver_rim", "vbios_rim")), papers)
    verdict.require()
    assert sum("no RIM" in note for note in verdict.devices[0].notes) == 2


def test_references_that_claim_the_same_measurement() -> None:
    device = gpu()
    values = {**vbios_manifest(device).measurements, 7: [device.blocks[7]]}
    conflicting = vbios_manifest(device, measurements=values)
    papers = collateral(rims=references(driver_manifest(device), conflicting))
    verdict = judged([device], papers=papers)
    assert (failing(verdict), codes(verdict)) == ({"nvidia.rim.conflict"}, {"rim_conflict"})
    more = (*papers.rims, *references(vbios_manifest(device)))
    judged([device], papers=collateral(rims=more)).require()


def test_references_of_which_none_is_valid() -> None:
    device = gpu()
    stranger = issue("RIM L4 Signer", None, authority=False)
    papers = collateral(rims=references(driver_manifest(device, chain=(stranger, stranger))))
    for expected in (
        expectations([device]),
        expectations([device], open=("driver_rim", "vbios_rim")),
    ):
        verdict = judged([device], expected, papers)
        assert "rim_unusable" in codes(verdict)
        assert any("nvidia_root_not_pinned" in note for note in verdict.devices[0].notes)


def test_what_is_no_manifest_is_refused() -> None:
    device = gpu()
    papers = collateral(rims=(("broken.xml", b"<a/>"), *collateral().rims))
    verdict = judged([device], papers=papers)
    assert codes(verdict) == {"rim_unusable"}
    assert "broken.xml (rim_malformed" in str(verdict.failures[0])


def test_manifests_are_bounded() -> None:
    device = gpu()
    known = collateral().rims
    more = tuple((f"{i}.xml", known[0][1]) for i in range(256))
    verdict = judged([device], papers=collateral(rims=(*known, *more)))
    verdict.require()
    assert verdict.notes[-1] == "RIMs after the first 256 were ignored"


# -- the set ----------------------------------------------------------------------------------


def test_a_gpu_of_eight_is_missing() -> None:
    devices = machine(8, 4).devices
    for gone in (0, 3, 7):
        left = [item for i, item in enumerate(devices) if i != gone]
        verdict = judged(left)
        assert codes(verdict) == {"nvidia_topology_mismatch"}
        pinned = judged(left, expectations(devices))
        assert codes(pinned) == {"nvidia_topology_mismatch", "pin_refused"}


def test_one_switch_four_times() -> None:
    devices = machine(8, 4).devices
    same = [replace(devices[8], name=f"switch.{i}") for i in range(4)]
    verdict = judged([*devices[:8], *same])
    assert codes(verdict) == {"nvidia_device_repeated", "nvidia_topology_mismatch"}


def test_one_gpu_twice() -> None:
    device = gpu()
    verdict = judged([device, replace(device, name="gpu.1")])
    assert codes(verdict) == {"nvidia_device_repeated"}
    parts = device.parts()
    again = {name.replace("gpu.0", "gpu.1"): data for name, data in parts.items()}
    verdict = verify_nvidia(
        {**parts, **again}, collateral(), expectations([device, device]), NOW, NONCE
    )
    assert codes(verdict) == {"nvidia_device_repeated"}


def test_one_gpu_with_two_leaf_certificates() -> None:
    device = gpu()
    leaf = leaf_under(device.chain[1])
    twin = replace(device, name="gpu.1", chain=(leaf, *device.chain[1:]))
    assert codes(judged([device, twin])) == {"nvidia_device_repeated"}


def test_topology() -> None:
    devices = machine(2, 2).devices
    judged(devices).require()
    mismatch = {"nvidia_topology_mismatch"}
    assert codes(judged(devices[:2])) == mismatch
    assert codes(judged([*devices, gpu("gpu.2")])) == mismatch
    assert codes(judged([*devices, switch("switch.2")])) == mismatch
    assert codes(judged([gpu(), switch()])) == mismatch
    other = machine(2, 2).devices
    assert codes(judged([devices[0], replace(other[1], name="gpu.1"), *devices[2:]])) == mismatch
    opened = expectations(devices[:2], open=("topology",))
    judged(devices[:2], opened).require()


def test_a_switch_that_is_not_locked() -> None:
    devices = machine(1, 1).devices
    unlocked = devices[1].saying(LOCK_SWITCH_STATUS=b"\0\0")
    assert codes(judged([devices[0], unlocked])) == {"nvidia_opaque_data_refused"}
    assert "nvidia_opaque_data_missing" in codes(
        judged([devices[0], devices[1].saying(SWITCH_GPU_PDIS=None)])
    )


def test_incomplete_sets() -> None:
    device = gpu()
    parts = device.parts()
    for name in parts:
        verdict = verify_nvidia({name: parts[name]}, collateral(), soundness(), NOW, None)
        assert codes(verdict) == {"nvidia_set_incomplete"}
    assert "nvidia_set_incomplete" in codes(verify_nvidia({}, collateral(), None, NOW, None))
    assert "nvidia_set_incomplete" in codes(judged([switch()]))


@pytest.mark.parametrize("name", ["gpu.report", "gpu.16.report", "gpu.00.chain", "cpu.0.report"])
def test_other_parts_are_malformed(name: str) -> None:
    with pytest.raises(EvidenceMalformed):
        verify_nvidia({name: b""}, Collateral(), None, NOW, None)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["gpu.0.report", "gpu.0.chain", "switch.1.report", "x"]),
        st.binary(max_size=64),
    )
)
def test_any_parts_are_judged_or_refused_by_name(parts: dict[str, bytes]) -> None:
    with suppress(AppraisalError):
        assert not verify_nvidia(parts, Collateral(), None, NOW, None).holds


_PARTS = gpu().parts()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(_PARTS["gpu.0.report"]) * 8 - 1))
def test_any_flipped_bit_of_a_report_is_refused(bit: int) -> None:
    data = bytearray(_PARTS["gpu.0.report"])
    data[bit // 8] ^= 1 << bit % 8
    parts = {**_PARTS, "gpu.0.report": bytes(data)}
    try:
        verdict = verify_nvidia(parts, collateral(), soundness(), NOW, NONCE)
    except EvidenceMalformed:
        return
    assert "nvidia_report_signature_invalid" in codes(verdict)
