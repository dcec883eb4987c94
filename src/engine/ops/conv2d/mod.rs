//! temporary naive
pub mod cpu;
#[derive(Clone, Copy, Debug)]
pub struct Conv2dParams {
    pub c_in: usize,
    pub c_out: usize,
    pub kernel: usize,
    pub stride: usize,
    pub pad: usize,
}
impl Conv2dParams {
    pub fn output_size(&self, h: usize, w: usize) -> (usize, usize) {
        let f = |s: usize| (s + 2 * self.pad - self.kernel) / self.stride + 1;
        (f(h), f(w))
    }
    pub fn weight_len(&self) -> usize {
        self.kernel * self.kernel * self.c_in * self.c_out
    }
    pub fn macs(&self, n: usize, h: usize, w: usize) -> u64 {
        let (a, b) = self.output_size(h, w);
        (n * a * b * self.weight_len()) as u64
    }
    pub fn packed_forward_len(&self) -> usize {
        self.weight_len()
    }
    pub fn packed_backward_len(&self) -> usize {
        self.weight_len()
    }
    pub fn backward_weight_workspace_len(&self, _n: usize, _h: usize, _w: usize) -> usize {
        1
    }
    pub fn gradient_pad(&self) -> usize {
        if self.stride == 1 { self.kernel - 1 - self.pad } else { usize::from(self.kernel > 1) }
    }
}
