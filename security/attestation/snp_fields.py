"""What SEV-SNP evidence says, by AMD's names, for people to read."""

from __future__ import annotations

from security.attestation.snp_certificates import Chain
from security.attestation.snp_endorsement import Endorsement
from security.attestation.snp_report import AttestationReport, Product, TcbVersion
from security.errors import AppraisalError

__all__ = ["chain_fields", "report_fields"]


def report_fields(report: AttestationReport, product: Product | None) -> dict[str, str]:
    """What a report says; TCB versions part by part where the product is known."""
    policy, platform, key = report.policy, report.platform_info, report.key_info
    fields = {
        "VERSION": str(report.version),
        "GUEST_SVN": str(report.guest_svn),
        "POLICY": f"{policy.raw:#x}",
        "POLICY.ABI_MINOR": str(policy.abi_minor),
        "POLICY.ABI_MAJOR": str(policy.abi_major),
        "POLICY.SMT": _bit(policy.smt),
        "POLICY.MIGRATE_MA": _bit(policy.migrate_ma),
        "POLICY.DEBUG": _bit(policy.debug),
        "POLICY.SINGLE_SOCKET": _bit(policy.single_socket),
        "POLICY.CXL_ALLOW": _bit(policy.cxl_allow),
        "POLICY.MEM_AES_256_XTS": _bit(policy.mem_aes_256_xts),
        "POLICY.RAPL_DIS": _bit(policy.rapl_dis),
        "POLICY.CIPHERTEXT_HIDING_DRAM": _bit(policy.ciphertext_hiding_dram),
        "POLICY.PAGE_SWAP_DISABLE": _bit(policy.page_swap_disable),
        "FAMILY_ID": report.family_id.hex(),
        "IMAGE_ID": report.image_id.hex(),
        "VMPL": str(report.vmpl),
        "SIGNATURE_ALGO": str(report.signature_algo),
        "CURRENT_TCB": _tcb(report.current_tcb, product),
        "PLATFORM_INFO": f"{platform.raw:#x}",
        "PLATFORM_INFO.SMT_EN": _bit(platform.smt_en),
        "PLATFORM_INFO.TSME_EN": _bit(platform.tsme_en),
        "PLATFORM_INFO.ECC_EN": _bit(platform.ecc_en),
        "PLATFORM_INFO.RAPL_DIS": _bit(platform.rapl_dis),
        "PLATFORM_INFO.CIPHERTEXT_HIDING_DRAM_EN": _bit(platform.ciphertext_hiding_dram_en),
        "PLATFORM_INFO.ALIAS_CHECK_COMPLETE": _bit(platform.alias_check_complete),
        "PLATFORM_INFO.TIO_EN": _bit(platform.tio_en),
        "AUTHOR_KEY_EN": _bit(key.author_key_en),
        "MASK_CHIP_KEY": _bit(key.mask_chip_key),
        "SIGNING_KEY": key.signing_key.name,
        "REPORT_DATA": report.report_data.hex(),
        "MEASUREMENT": report.measurement.hex(),
        "HOST_DATA": report.host_data.hex(),
        "ID_KEY_DIGEST": report.id_key_digest.hex(),
        "AUTHOR_KEY_DIGEST": report.author_key_digest.hex(),
        "REPORT_ID": report.report_id.hex(),
        "REPORT_ID_MA": report.report_id_ma.hex(),
        "REPORTED_TCB": _tcb(report.reported_tcb, product),
        "CHIP_ID": report.chip_id.hex(),
        "COMMITTED_TCB": _tcb(report.committed_tcb, product),
        "CURRENT_VERSION": str(report.current),
        "COMMITTED_VERSION": str(report.committed),
        "LAUNCH_TCB": _tcb(report.launch_tcb, product),
    }
    if report.cpuid is not None:
        family, model, stepping = report.cpuid
        fields["CPUID_FAM_ID"] = f"{family:02X}h"
        fields["CPUID_MOD_ID"] = f"{model:02X}h"
        fields["CPUID_STEP"] = f"{stepping:02X}h"
    if report.launch_mit_vector is not None:
        fields["LAUNCH_MIT_VECTOR"] = f"{report.launch_mit_vector:#x}"
        fields["CURRENT_MIT_VECTOR"] = f"{report.current_mit_vector or 0:#x}"
    return fields


def chain_fields(chain: Chain) -> dict[str, str]:
    """What the certificates say."""
    endorsement: Endorsement = chain.endorsement
    key = endorsement.signing_key.name
    fields = {
        f"{key}.productName": endorsement.product_name,
        f"{key}.TCB": _tcb(endorsement.tcb.to_bytes(endorsement.product), endorsement.product),
    }
    if endorsement.hwid:
        fields[f"{key}.hwID"] = endorsement.hwid.hex()
    if endorsement.csp_id:
        fields[f"{key}.csp_id"] = endorsement.csp_id
    for role, certificate in chain.certificates:
        fields[f"{role}.SHA-256"] = certificate.fingerprint
        fields[f"{role}.serial"] = f"{certificate.serial:x}"
        fields[f"{role}.notBefore"] = str(certificate.not_before)
        fields[f"{role}.notAfter"] = str(certificate.not_after)
    return fields


def _tcb(octets: bytes, product: Product | None) -> str:
    if product is None:
        return octets.hex()
    try:
        return f"{octets.hex()} ({TcbVersion.of(octets, product)})"
    except AppraisalError:
        return octets.hex()


def _bit(value: bool) -> str:
    return "1" if value else "0"
