//! Prediction: a trained network on single images.

use std::collections::VecDeque;
use std::path::Path;

use super::args::Device;
use super::device;
use super::error::TrainError;
use super::session::load_model;
use crate::data::Image;
use crate::data::augment::letterbox::{Fit, Letterbox, unletterbox};
use crate::detect::decode::{HeadLevel, detect};
use crate::detect::models::Detector;
use crate::detect::nms::{Detection, NmsArgs};
use crate::engine::device::cpu::Executor;
use crate::engine::params::ParamSet;
use crate::engine::plan::{Mode, Plan};

/// Input shapes whose plans are kept; a folder of photographs has two.
const PLANS_MAX: usize = 8;
/// The input divides by this.
const STRIDE_MAX: usize = 32;
/// Largest input side, pixels.
pub const IMGSZ_MAX: usize = 8192;

/// Image size when neither the caller nor the weights file says one, pixels.
const IMGSZ_DEFAULT: usize = 640;

/// A network ready to predict, one image at a time.
pub struct Predictor {
    architecture: String,
    names: Vec<String>,
    imgsz: usize,
    nms: NmsArgs,
    params: ParamSet,
    executor: Executor,
    /// Most recently used last.
    plans: VecDeque<Shaped>,
}

struct Shaped {
    hw: (usize, usize),
    detector: Detector,
    plan: Plan,
}

impl Predictor {
    /// Reads trained weights and prepares to look at images scaled so that the longer side is `imgsz` pixels,
    /// rounded up to a multiple of 32 (by default as in training), on `device` with `threads` threads (0: all cores).
    ///
    /// # Errors
    /// [`TrainError::Weights`] for weights that cannot be used, [`TrainError::Config`] for a size out of range,
    /// [`TrainError::Engine`] when threads are refused.
    pub fn open(
        weights: &Path,
        imgsz: Option<usize>,
        nms: NmsArgs,
        threads: usize,
        device: Device,
    ) -> Result<Predictor, TrainError> {
        device::cpu_only(device, "prediction")?;
        let model = load_model(weights)?;
        let imgsz = imgsz.or(model.weights.imgsz).unwrap_or(IMGSZ_DEFAULT);
        if !(1..=IMGSZ_MAX).contains(&imgsz) {
            let message = format!("got {imgsz}, allowed: 1 to {IMGSZ_MAX} pixels");
            return Err(TrainError::Config { key: "imgsz".into(), message });
        }
        let names = model.names();
        let detector = Detector::build(&model.architecture, names.len(), STRIDE_MAX, STRIDE_MAX);
        let detector = detector.map_err(|source| TrainError::Weights {
            path: weights.to_owned(),
            message: format!("{} cannot be built for it", model.architecture),
            source: Some(Box::new(source)),
        })?;
        let mut params = ParamSet::new(&detector.graph);
        model.load_into(weights, &mut params)?;
        let executor =
            Executor::new(&[], threads).map_err(|source| TrainError::Engine { action: "start", source })?;
        let (architecture, imgsz) = (model.architecture, imgsz.next_multiple_of(STRIDE_MAX));
        Ok(Predictor { architecture, names, imgsz, nms, params, executor, plans: VecDeque::new() })
    }

    /// Class names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Objects in an image, best first; boxes in pixels of the image itself.
    ///
    /// The image is letterboxed with the least padding that makes both sides multiples of 32.
    ///
    /// # Errors
    /// [`TrainError::Engine`] when memory is refused.
    pub fn predict(&mut self, image: &Image) -> Result<Vec<Detection>, TrainError> {
        let original_hw = (image.height, image.width);
        let fit = Fit::PadToStride(STRIDE_MAX);
        let letterbox = Letterbox::new(original_hw, (self.imgsz, self.imgsz), fit, true);
        let input_hw = letterbox.out_hw;
        let shaped = self.shaped(input_hw)?;
        letterbox.draw(image, self.executor.input_mut(&shaped.plan));
        self.executor.forward(&shaped.detector.graph, &shaped.plan, &mut self.params);
        let levels: Vec<HeadLevel<'_>> = shaped
            .detector
            .strides
            .iter()
            .enumerate()
            .map(|(level, &stride)| {
                let [_, h, w, _] = shaped.plan.output_shape(2 * level);
                HeadLevel {
                    stride,
                    h,
                    w,
                    boxes: self.executor.output(&shaped.plan, 2 * level),
                    scores: self.executor.output(&shaped.plan, 2 * level + 1),
                }
            })
            .collect();
        let found = detect(&levels, shaped.detector.nc, shaped.detector.reg_max, 1, &self.nms);
        self.plans.push_back(shaped);
        let found = found.into_iter().flatten();
        Ok(found.map(|d| Detection { xyxy: unletterbox(d.xyxy, input_hw, original_hw), ..d }).collect())
    }

    /// Takes the plan for an input shape out of the kept ones, or makes it.
    fn shaped(&mut self, hw: (usize, usize)) -> Result<Shaped, TrainError> {
        if let Some(index) = self.plans.iter().position(|s| s.hw == hw)
            && let Some(shaped) = self.plans.remove(index)
        {
            return Ok(shaped);
        }
        if self.plans.len() >= PLANS_MAX {
            self.plans.pop_front();
        }
        let detector = Detector::build(&self.architecture, self.names.len(), hw.0, hw.1)
            .map_err(|e| TrainError::Internal { message: e.to_string() })?;
        let plan = Plan::new(&detector.graph, 1, Mode::Eval);
        self.executor
            .reserve(&plan)
            .map_err(|source| TrainError::Engine { action: "take memory", source })?;
        Ok(Shaped { hw, detector, plan })
    }
}
