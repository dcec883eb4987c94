//! The orthogonalised step of MuSGD on a CUDA device: all matrices of a network in eighteen launches
//! (`kernels/muon.cu`).

use super::{Form, GroupKind, Optimizer};
use crate::engine::device::cuda::{Buffer, DeviceError, FastDivisor, Kernel, Launch, Stream};

/// Numbers that one block of the element-wise kernels handles.
const PART_NUMBERS: usize = 4096;
/// Side of the tiles of the products.
const TILE: usize = 64;
/// Newton-Schulz steps.
const ITERATIONS: usize = 5;
/// Every array starts at a multiple of this, bytes.
const ALIGNMENT: usize = 256;

/// `struct Matrix`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Matrix {
    columns: FastDivisor,
    first: u64,
    x: u64,
    gram: u64,
    rows: u32,
    cols: u32,
    pitch: u32,
    m: u32,
    gram_pitch: u32,
    is_tall: u32,
    group: u32,
    aspect_root: f32,
    first_part: u32,
    parts: u32,
}

/// `struct MuonArgs`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct MuonArgs {
    values: u64,
    grads: u64,
    momentum: u64,
    table: u64,
    result: u64,
    matrices: u64,
    tiles: u64,
    partials: u64,
    x: u64,
    x_next: u64,
    gram: u64,
    mix: u64,
}

/// The matrices of an optimiser and how the launches are cut.
struct Layout {
    matrices: Vec<Matrix>,
    /// Matrix and index within it, for the element-wise kernels, the square products, the products with S.
    parts: Vec<[u32; 2]>,
    squares: Vec<[u32; 2]>,
    products: Vec<[u32; 2]>,
    /// Byte offsets in the workspace.
    at: Places,
}

#[derive(Clone, Copy, Default)]
struct Places {
    matrices: usize,
    parts: usize,
    squares: usize,
    products: usize,
    partials: usize,
    x: usize,
    x_next: usize,
    gram: usize,
    mix: usize,
    bytes: usize,
}

impl Layout {
    fn new(optimizer: &Optimizer) -> Layout {
        let mut matrices: Vec<Matrix> = Vec::new();
        let (mut parts, mut squares, mut products) = (Vec::new(), Vec::new(), Vec::new());
        let (mut x, mut gram) = (0usize, 0usize);
        for (tensor, &group) in optimizer.tensors.iter().zip(&optimizer.group_of) {
            let Form::Matrix { rows, cols, aspect } = tensor.form else { continue };
            if optimizer.groups[group].kind != GroupKind::Muon || tensor.frozen || rows * cols == 0 {
                continue;
            }
            assert_eq!(tensor.range.len(), rows * cols, "{} is {rows} x {cols}", tensor.name);
            let (m, pitch) = (rows.min(cols), cols.next_multiple_of(8));
            let (gram_pitch, count) = (m.next_multiple_of(8), (rows * cols).div_ceil(PART_NUMBERS));
            let index = matrices.len() as u32;
            let tiles = |a: usize, b: usize| a.div_ceil(TILE) * b.div_ceil(TILE);
            let list = |count: usize| (0..count as u32).map(move |i| [index, i]);
            matrices.push(Matrix {
                columns: FastDivisor::new(cols as u32),
                first: tensor.range.start as u64,
                x: x as u64,
                gram: gram as u64,
                rows: rows as u32,
                cols: cols as u32,
                pitch: pitch as u32,
                m: m as u32,
                gram_pitch: gram_pitch as u32,
                is_tall: u32::from(rows > cols),
                group: group as u32,
                aspect_root: aspect.sqrt(),
                first_part: parts.len() as u32,
                parts: count as u32,
            });
            parts.extend(list(count));
            squares.extend(list(tiles(m, m)));
            products.extend(list(tiles(rows, cols)));
            x += rows * pitch;
            gram += m * gram_pitch;
        }
        let mut at = Places::default();
        let mut take = |bytes: usize| {
            let place = at.bytes;
            at.bytes = (place + bytes).next_multiple_of(ALIGNMENT);
            place
        };
        let places = Places {
            matrices: take(size_of_val(&matrices[..])),
            parts: take(size_of_val(&parts[..])),
            squares: take(size_of_val(&squares[..])),
            products: take(size_of_val(&products[..])),
            partials: take(parts.len() * 8),
            x: take(x * 2),
            x_next: take(x * 2),
            gram: take(gram * 2),
            mix: take(gram * 2),
            bytes: 0,
        };
        Layout { matrices, parts, squares, products, at: Places { bytes: at.bytes, ..places } }
    }
}

/// The step's kernels, tables and scratch matrices.
pub(super) struct DeviceMuon {
    update: Kernel,
    normalise: Kernel,
    gram: Kernel,
    mix: Kernel,
    product: Kernel,
    apply: Kernel,
    workspace: Buffer,
    at: Places,
    /// Blocks of the element-wise kernels, the square products, the products with S.
    blocks: [u32; 3],
}

impl DeviceMuon {
    /// Bytes of device memory, exact.
    pub fn bytes(optimizer: &Optimizer) -> usize {
        Layout::new(optimizer).at.bytes
    }

    /// Bytes held.
    pub fn allocated_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// Loads the kernels, allocates, sends the tables.
    pub fn new(stream: &Stream, optimizer: &Optimizer) -> Result<DeviceMuon, DeviceError> {
        let layout = Layout::new(optimizer);
        let module = stream.device().module("muon")?;
        let workspace = stream.device().allocate(layout.at.bytes)?;
        // The padding of rows must be zero and is never written.
        // SAFETY: the whole buffer, just allocated.
        unsafe { stream.fill(workspace.pointer(), 0, workspace.bytes())? };
        stream.upload(&workspace, layout.at.matrices, &layout.matrices)?;
        stream.upload(&workspace, layout.at.parts, &layout.parts)?;
        stream.upload(&workspace, layout.at.squares, &layout.squares)?;
        stream.upload(&workspace, layout.at.products, &layout.products)?;
        let blocks = [layout.parts.len(), layout.squares.len(), layout.products.len()];
        Ok(DeviceMuon {
            update: module.kernel("muon_update")?,
            normalise: module.kernel("muon_normalise")?,
            gram: module.kernel("muon_gram")?,
            mix: module.kernel("muon_mix")?,
            product: module.kernel("muon_product")?,
            apply: module.kernel("muon_apply")?,
            workspace,
            at: layout.at,
            blocks: blocks.map(|count| count as u32),
        })
    }

    /// Queues the step. `table` holds momentum and scale of each group, `result` what the norm's kernel left.
    ///
    /// # Safety
    /// As for [`super::DeviceOptimizer::step`].
    pub unsafe fn step(
        &self,
        stream: &Stream,
        values: u64,
        grads: u64,
        momentum: u64,
        table: u64,
        result: u64,
    ) -> Result<(), DeviceError> {
        let [parts, squares, products] = self.blocks;
        if parts == 0 {
            return Ok(());
        }
        let at = |offset: usize| self.workspace.pointer() + offset as u64;
        let mut args = MuonArgs {
            values,
            grads,
            momentum,
            table,
            result,
            matrices: at(self.at.matrices),
            tiles: at(self.at.parts),
            partials: at(self.at.partials),
            x: at(self.at.x),
            x_next: at(self.at.x_next),
            gram: at(self.at.gram),
            mix: at(self.at.mix),
        };
        // SAFETY: the caller's promise for the vectors; the tables name places within them and within the workspace;
        // the stream orders the launches.
        let launch = |kernel: &Kernel, blocks: u32, threads: u32, args: &MuonArgs| unsafe {
            stream.launch(kernel, Launch::row(blocks, threads), args)
        };
        launch(&self.update, parts, 256, &args)?;
        launch(&self.normalise, parts, 256, &args)?;
        for _ in 0..ITERATIONS {
            args.tiles = at(self.at.squares);
            launch(&self.gram, squares, 128, &args)?;
            launch(&self.mix, squares, 128, &args)?;
            args.tiles = at(self.at.products);
            launch(&self.product, products, 128, &args)?;
            std::mem::swap(&mut args.x, &mut args.x_next);
        }
        args.tiles = at(self.at.parts);
        launch(&self.apply, parts, 256, &args)
    }
}
