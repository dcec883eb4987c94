//! SHIM
use super::*;
pub fn stats_layout(_p: &Conv2dParams, _y: &View, _precision: Precision, _chip: &Chip) -> StatsLayout {
    unimplemented!()
}
pub fn workspace_len(_p: &Conv2dParams, _dy: &View, _precision: Precision, _chip: &Chip) -> usize {
    0
}
pub fn stems() -> &'static [&'static str] {
    &[]
}
pub struct ImageKernels;
impl ImageKernels {
    pub fn load(_d: &Arc<Device>, _p: Precision) -> Result<Self, DeviceError> {
        Ok(ImageKernels)
    }
    pub unsafe fn forward(
        &self,
        _: &Stream,
        _: &Conv2dParams,
        _: Tensor,
        _: u64,
        _: Tensor,
        _: Epilogue,
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
