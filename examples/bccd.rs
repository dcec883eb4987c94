use boxwright::{
    train::{args::TrainArgs, event::*, session::*},
    yaml,
};
struct P(std::time::Instant);
impl Observer for P {
    fn event(&mut self, e: &SessionEvent) {
        let s = serde_json::to_string(e).unwrap();
        if !s.contains("\"step\"") || s.contains("epoch\"") {
            if !s.contains("\"event\":\"step\"") {
                println!("{:.1} {}", self.0.elapsed().as_secs_f64(), &s[..s.len().min(420)]);
            }
        }
    }
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let text = format!(
        "model: yolov8n.yaml\ndata: {}\nimgsz: {}\nbatch: 16\nepochs: {}\nseed: {}\npretrained: false\nworkers: {}\nplots: {}\n{}",
        a[1],
        a[2],
        a[3],
        a[4],
        a[6],
        a[7],
        a.get(8).map(|s| s.replace(',', "\n")).unwrap_or_default()
    );
    let node = yaml::parse(text.as_bytes(), "job").unwrap();
    let mut f = yaml::Faults::new("job");
    let (args, _) = TrainArgs::read(&node, "train", &mut f);
    let args = match args {
        Some(x) => x,
        None => {
            eprintln!("{:?}", f.list());
            return;
        }
    };
    let mut o = P(std::time::Instant::now());
    let mut spec = SessionSpec::new(args, a[5].clone(), "t");
    spec.threads = 2;
    match Session::new(spec, &mut o).run() {
        Ok(x) => println!("{x:?}"),
        Err(e) => println!("ERR {e:?}"),
    }
}
