//! The end of a run: the best weights are validated once more and everything is drawn.

use super::pictures;
use super::{Outcome, Run, Validation, metric_map};
use crate::train::error::TrainError;
use crate::train::event::OutcomeKind;
use crate::train::run_folder::round5;
use crate::train::weights_file;

impl Run<'_, '_> {
    /// Validates the best weights, draws the plots, and says how the run ended.
    pub(super) fn finish(&mut self) -> Result<Outcome, TrainError> {
        let best = self.reporter.folder.weights("best");
        if best.is_file() {
            weights_file::read(&best, &mut self.network.params)?;
            self.network.push_params()?;
        } else {
            self.network.swap_average(&mut self.ema)?;
        }
        let Some(validation) = self.validate_network(true)? else { return self.stopped_at_the_end() };
        self.report_validation(&validation, self.progress.epoch, self.args.verbose);
        if self.args.plots {
            self.draw(&validation);
        }
        let m = &validation.metrics;
        let mut metrics = metric_map(&[m.precision, m.recall, m.map50, m.map50_95].map(round5));
        metrics.insert("fitness".into(), round5(m.fitness).into());
        Ok(self.outcome(OutcomeKind::Completed, metrics))
    }

    /// Told to stop during the last validation: the newest checkpoint stands at the end of the last epoch
    /// and a resume comes straight back here.
    fn stopped_at_the_end(&mut self) -> Result<Outcome, TrainError> {
        Ok(self.outcome(OutcomeKind::Stopped, metric_map(&self.progress.metrics)))
    }

    /// Plots; one that fails is worth a warning.
    fn draw(&mut self, validation: &Validation) {
        let title = format!("{} on {}", self.detector.name, dataset_name(&self.args.data));
        let drawn = pictures::of_run(self.reporter.folder.path(), &title, validation, &self.dataset.names);
        for error in drawn.into_iter().filter_map(Result::err) {
            let cause = std::error::Error::source(&error).map(|c| format!(": {c}")).unwrap_or_default();
            self.reporter.warn(format!("{error}{cause}"));
        }
    }
}

/// A short name for a dataset: the stem of its file, or its folder's name when the file is just `data.yaml`.
fn dataset_name(data: &str) -> String {
    let path = std::path::Path::new(data);
    let stem = path.file_stem().unwrap_or_default();
    let folder = path.parent().and_then(|p| p.file_name());
    let name = if stem == "data" { folder.unwrap_or(stem) } else { stem };
    name.to_string_lossy().into_owned()
}
