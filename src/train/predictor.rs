//! Prediction: a trained network on single images.

use std::path::Path;

use super::error::TrainError;
use super::session::{Compute, Network, load_model};
use crate::data::Image;
use crate::data::augment::letterbox::{Fit, Letterbox, unletterbox};
use crate::detect::losses::detection::LossConfig;
use crate::detect::nms::{Detection, NmsArgs};

/// The input divides by this.
const STRIDE_MAX: usize = 32;
/// Largest input side, pixels.
pub const IMGSZ_MAX: usize = 8192;

/// Image size when neither the caller nor the weights file says one, pixels.
const IMGSZ_DEFAULT: usize = 640;

/// A network ready to predict, one image at a time.
pub struct Predictor {
    names: Vec<String>,
    imgsz: usize,
    nms: NmsArgs,
    network: Network,
    input: Vec<u8>,
}

impl Predictor {
    /// Reads trained weights and prepares to look at images scaled so that the longer side is `imgsz` pixels,
    /// rounded up to a multiple of 32 (by default as in training), on the
    /// device given.
    ///
    /// # Errors
    /// [`TrainError::Weights`] for weights that cannot be used, [`TrainError::Config`] for a size out of range,
    /// [`TrainError::Engine`] when threads are refused.
    pub fn open(
        weights: &Path,
        imgsz: Option<usize>,
        nms: NmsArgs,
        compute: &Compute,
    ) -> Result<Predictor, TrainError> {
        let model = load_model(weights)?;
        let imgsz = imgsz.or(model.weights.imgsz).unwrap_or(IMGSZ_DEFAULT);
        if !(1..=IMGSZ_MAX).contains(&imgsz) {
            let message = format!("got {imgsz}, allowed: 1 to {IMGSZ_MAX} pixels");
            return Err(TrainError::Config { key: "imgsz".into(), message });
        }
        let names = model.names();
        let mut network =
            Network::new(&model.architecture, names.len(), LossConfig::new(names.len()), compute).map_err(
                |error| match error {
                    TrainError::Config { message, .. } => {
                        TrainError::Weights { path: weights.to_owned(), message, source: None }
                    }
                    other => other,
                },
            )?;
        model.load_into(weights, &mut network.params)?;
        network.push_params()?;
        let imgsz = imgsz.next_multiple_of(STRIDE_MAX);
        Ok(Predictor { names, imgsz, nms, network, input: Vec::new() })
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
        self.input.resize(input_hw.0 * input_hw.1 * 3, 0);
        letterbox.draw(image, &mut self.input);
        let (h, w) = input_hw;
        let found = self.network.detect(&self.input, (1, h, w), None, &self.nms)?;
        let found = found.detections.into_iter().flatten();
        Ok(found.map(|d| Detection { xyxy: unletterbox(d.xyxy, input_hw, original_hw), ..d }).collect())
    }
}
