//! The probe symbol: plain data that tells what a library is before `abi_stable` looks at it.

/// Name of the exported symbol.
pub const PROBE_SYMBOL: &[u8] = b"CONCEPTLOOM_PLUGIN_PROBE\0";

/// First bytes of every probe.
pub const PROBE_MAGIC: [u8; 16] = *b"CONCEPTLOOMPROBE";

/// The exported static. Only grows: `struct_size` says how much of it there is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// [`PROBE_MAGIC`].
    pub magic: [u8; 16],
    /// Size of this struct in the library.
    pub struct_size: u32,
    /// Major version of the contract; different ones do not work together.
    pub contract_major: u32,
    /// Minor version of the contract.
    pub contract_minor: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Name of the plugin, UTF-8, padded with zeros.
    pub name: [u8; 64],
    /// Version of the plugin, UTF-8, padded with zeros.
    pub version: [u8; 32],
}

impl Probe {
    /// The probe of a plugin built against this crate.
    #[must_use]
    pub const fn new(name: &str, version: &str) -> Self {
        Self {
            magic: PROBE_MAGIC,
            struct_size: size_of::<Self>() as u32,
            contract_major: number(env!("CARGO_PKG_VERSION_MAJOR")),
            contract_minor: number(env!("CARGO_PKG_VERSION_MINOR")),
            reserved: 0,
            name: padded(name),
            version: padded(version),
        }
    }

    /// Name of the plugin.
    #[must_use]
    pub fn name(&self) -> String {
        text(&self.name)
    }

    /// Version of the plugin.
    #[must_use]
    pub fn version(&self) -> String {
        text(&self.version)
    }

    /// Why a host built against this crate cannot load the library; `None` if it can.
    #[must_use]
    pub fn incompatibility(&self) -> Option<String> {
        if self.magic != PROBE_MAGIC {
            return Some("its probe symbol is not Conceptloom's".to_owned());
        }
        let ours = number(env!("CARGO_PKG_VERSION_MAJOR"));
        (self.contract_major != ours).then(|| {
            format!(
                "the plugin {} {} speaks version {}.{} of the contract and this host version {}; build both from \
                 the same major version",
                self.name(),
                self.version(),
                self.contract_major,
                self.contract_minor,
                crate::CONTRACT_VERSION
            )
        })
    }
}

const fn number(digits: &str) -> u32 {
    let bytes = digits.as_bytes();
    let (mut value, mut i) = (0, 0);
    while i < bytes.len() {
        value = value * 10 + (bytes[i] - b'0') as u32;
        i += 1;
    }
    value
}

const fn padded<const N: usize>(text: &str) -> [u8; N] {
    let bytes = text.as_bytes();
    let (mut out, mut i) = ([0; N], 0);
    while i < bytes.len() && i < N {
        out[i] = bytes[i];
        i += 1;
    }
    out
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_of_another_major_version_is_named() {
        let mut probe = Probe::new("demo", "0.3.1");
        assert_eq!(
            (probe.name().as_str(), probe.version().as_str()),
            ("demo", "0.3.1")
        );
        assert_eq!(probe.incompatibility(), None);
        probe.contract_major += 1;
        assert!(probe.incompatibility().unwrap().contains("demo 0.3.1"));
    }
}
