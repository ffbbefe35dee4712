//! Where memory lives and what it holds, in DLPack's numbers.

use std::fmt;

use abi_stable::StableAbi;
use half::{bf16, f16};

/// Where memory lives; numbers of DLPack.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId {
    /// 1 CPU, 2 CUDA, 3 CUDA pinned host memory, 8 Metal, 12 extension, 13 CUDA managed memory.
    pub kind: i32,
    /// Which device of this kind.
    pub index: i32,
}

impl DeviceId {
    /// Ordinary memory of the process.
    pub const CPU: Self = Self { kind: 1, index: 0 };

    /// Whether the CPU can read such memory: ordinary, pinned or managed.
    #[must_use]
    pub fn is_host_memory(self) -> bool {
        matches!(self.kind, 1 | 3 | 13)
    }
}

/// Element type; numbers of DLPack.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, PartialEq, Eq)]
pub struct DataType {
    /// 0 signed, 1 unsigned, 2 float, 4 bfloat, 6 bool.
    pub code: u8,
    /// Bits per element.
    pub bits: u8,
    /// Elements per lane group; 1.
    pub lanes: u16,
}

impl DataType {
    /// 32-bit float.
    pub const F32: Self = Self::new(2, 32);
    /// IEEE half precision.
    pub const F16: Self = Self::new(2, 16);
    /// bfloat16.
    pub const BF16: Self = Self::new(4, 16);
    /// Bytes.
    pub const U8: Self = Self::new(1, 8);

    const fn new(code: u8, bits: u8) -> Self {
        let lanes = 1;
        Self { code, bits, lanes }
    }

    /// Bytes of an element; `None` for elements that share bytes.
    #[must_use]
    pub fn bytes(self) -> Option<usize> {
        let bits = usize::from(self.bits) * usize::from(self.lanes);
        (bits > 0 && bits.is_multiple_of(8)).then_some(bits / 8)
    }
}

/// `f32`, `bf16`, `u8`, `i64`, `f32x4`.
impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, bits, lanes } = *self;
        match code {
            0 => write!(f, "i{bits}"),
            1 => write!(f, "u{bits}"),
            2 => write!(f, "f{bits}"),
            4 => write!(f, "bf{bits}"),
            6 => write!(f, "bool{bits}"),
            _ => write!(f, "type {code} of {bits} bits"),
        }?;
        if lanes == 1 {
            Ok(())
        } else {
            write!(f, "x{lanes}")
        }
    }
}

impl fmt::Debug for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An element that this crate reads and writes: every pattern of its bits is a value.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// What it is called on wires.
    const DATA_TYPE: DataType;

    /// The nearest `f32`; all of them have one.
    fn to_f32(self) -> f32;
}

macro_rules! elements {
    ($($element:ty, $data_type:expr, $to_f32:expr;)+) => {$(
        impl sealed::Sealed for $element {}

        impl Element for $element {
            const DATA_TYPE: DataType = $data_type;

            fn to_f32(self) -> f32 {
                $to_f32(self)
            }
        }
    )+};
}

elements! {
    f32, DataType::F32, std::convert::identity;
    f16, DataType::F16, f16::to_f32;
    bf16, DataType::BF16, bf16::to_f32;
    u8, DataType::U8, f32::from;
}
