//! SHIM
use super::*;
pub fn stats_layout(_p: &Conv2dParams, _s: &Shape) -> StatsLayout {
    unimplemented!()
}
pub fn workspace_len(_pass: Pass, _p: &Conv2dParams, _s: &Shape, _c: &Chip) -> usize {
    0
}
pub fn stems() -> &'static [&'static str] {
    &[]
}
pub struct PlainKernels;
#[allow(clippy::too_many_arguments)]
impl PlainKernels {
    pub fn load(_d: &Arc<Device>, _p: Precision) -> Result<Self, DeviceError> {
        Ok(PlainKernels)
    }
    pub unsafe fn forward(
        &self,
        _: &Stream,
        _: &Conv2dParams,
        _: Tensor,
        _: u64,
        _: Tensor,
        _: Epilogue,
        _: u64,
    ) -> Result<(), DeviceError> {
        unimplemented!()
    }
    pub unsafe fn backward_data(
        &self,
        _: &Stream,
        _: &Conv2dParams,
        _: Tensor,
        _: u64,
        _: Tensor,
        _: bool,
        _: u64,
    ) -> Result<(), DeviceError> {
        unimplemented!()
    }
    pub unsafe fn backward_weight(
        &self,
        _: &Stream,
        _: &Conv2dParams,
        _: Tensor,
        _: Tensor,
        _: u64,
        _: u64,
    ) -> Result<(), DeviceError> {
        unimplemented!()
    }
}
