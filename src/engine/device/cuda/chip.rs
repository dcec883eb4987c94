//! What a chip offers.

/// Facts about one GPU that decide which kernels run and how they are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chip {
    /// Name as the driver gives it.
    pub name: String,
    /// Unique identity, as 32 hexadecimal digits.
    pub uuid: String,
    /// Compute capability, major.
    pub major: u32,
    /// Compute capability, minor.
    pub minor: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory that a block can ask for, bytes.
    pub shared_bytes_max: u32,
    /// Second-level cache, bytes.
    pub l2_bytes: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// Name of the device that the emulator of the tests shows.
const EMULATION: &str = "CPU emulation";

impl Chip {
    /// Oldest compute capability that the kernels are written for.
    pub const OLDEST: (u32, u32) = (7, 5);

    /// Whether the tensor cores take bfloat16 and copies to shared memory run asynchronously (8.0 and later).
    pub fn has_tensor_bf16(&self) -> bool {
        self.major >= 8
    }

    /// The identity as the driver's own tools write it: `GPU-8a1b2c3d-...`.
    pub fn identity(&self) -> String {
        let digits = self.uuid.as_str();
        let part = |from: usize, to: usize| digits.get(from..to).unwrap_or_default();
        let parts = [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)];
        format!("GPU-{}", parts.join("-"))
    }

    /// Whether there are Hopper's products of warpgroups and its copy engine.
    pub fn has_wgmma(&self) -> bool {
        (self.major, self.minor) == (9, 0)
    }

    /// The target that NVRTC compiles for. Hopper's own instructions need the `a` form.
    pub fn target(&self) -> String {
        let suffix = if self.has_wgmma() { "a" } else { "" };
        format!("sm_{}{}{suffix}", self.major, self.minor)
    }

    /// True for the emulator that tests run kernels on: its times mean nothing.
    pub fn is_emulated(&self) -> bool {
        self.name == EMULATION
    }
}
