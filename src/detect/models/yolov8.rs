//! YOLOv8 detection: one table, five scales (models.md §5.1).

use super::table::{Module, Row, Scale, Table};

/// The scales: depth, width, largest base channels.
const SCALES: [(&str, Scale); 5] = [
    ("yolov8n", Scale { depth: 0.33, width: 0.25, max_channels: 1024 }),
    ("yolov8s", Scale { depth: 0.33, width: 0.50, max_channels: 1024 }),
    ("yolov8m", Scale { depth: 0.67, width: 0.75, max_channels: 768 }),
    ("yolov8l", Scale { depth: 1.0, width: 1.0, max_channels: 512 }),
    ("yolov8x", Scale { depth: 1.0, width: 1.25, max_channels: 512 }),
];

/// Names of the shipped scales.
pub const NAMES: [&str; 5] = ["yolov8n", "yolov8s", "yolov8m", "yolov8l", "yolov8x"];

/// The table of a named scale.
pub fn table(name: &str) -> Option<Table> {
    let scale = SCALES.iter().find(|(n, _)| *n == name)?.1;
    Some(Table { scale, reg_max: 16, rows: rows() })
}

fn rows() -> Vec<Row> {
    let conv = |channels| Row::new(&[-1], 1, Module::Conv { channels, kernel: 3, stride: 2 });
    let c2f = |repeats, channels, shortcut| Row::new(&[-1], repeats, Module::C2f { channels, shortcut });
    let up = || Row::new(&[-1], 1, Module::Upsample { factor: 2 });
    let join = |with| Row::new(&[-1, with], 1, Module::Concat);
    vec![
        conv(64),                                                       // 0, /2
        conv(128),                                                      // 1, /4
        c2f(3, 128, true),                                              // 2
        conv(256),                                                      // 3, /8
        c2f(6, 256, true),                                              // 4
        conv(512),                                                      // 5, /16
        c2f(6, 512, true),                                              // 6
        conv(1024),                                                     // 7, /32
        c2f(3, 1024, true),                                             // 8
        Row::new(&[-1], 1, Module::Sppf { channels: 1024, kernel: 5 }), // 9
        up(),                                                           // 10
        join(6),                                                        // 11
        c2f(3, 512, false),                                             // 12
        up(),                                                           // 13
        join(4),                                                        // 14
        c2f(3, 256, false),                                             // 15, /8
        conv(256),                                                      // 16
        join(12),                                                       // 17
        c2f(3, 512, false),                                             // 18, /16
        conv(512),                                                      // 19
        join(9),                                                        // 20
        c2f(3, 1024, false),                                            // 21, /32
        Row::new(&[15, 18, 21], 1, Module::Detect),                     // 22
    ]
}
