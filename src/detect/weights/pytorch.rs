//! Reader of the reference's `.pt` checkpoints: a ZIP archive with one object stream and raw storages.
//!
//! Nothing in the file is executed (see [`pickle`](super::pickle)). What is read: the parameters and buffers of the
//! model (the averaged one if present), class names, the model table, the training arguments. Memory is bounded by a
//! small multiple of the file's size.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Seek};
use std::path::Path;
use std::rc::Rc;

use serde_json::Value;
use zip::ZipArchive;

use super::pickle::{Id, Node, Pickle};
use super::{Dtype, Tensor, TensorMap, WeightsError};

/// Deepest nesting of modules and of plain values.
const DEPTH_MAX: usize = 48;
/// Most steps while walking modules and plain values: one per entry looked at and per character copied. Objects may be
/// shared, so without it a small file could unfold into an endless tree.
const WORK_MAX: usize = 50_000_000;
/// Most dimensions of a tensor.
const RANK_MAX: usize = 12;
/// Longest class name, bytes.
const CLASS_NAME_MAX: usize = 1024;
/// Longest object stream, bytes.
const STREAM_MAX: u64 = 64 << 20;
/// Bytes of tensors handed out per byte of file: halves become singles, and storages may be shared.
const EXPANSION_MAX: u64 = 16;

/// What a checkpoint holds.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// Parameters and buffers by state-dict name; floats as single precision, integers as 64-bit integers.
    pub tensors: TensorMap,
    /// Class names in order of their index; empty when the file has none.
    pub class_names: Vec<String>,
    /// Number of classes, from the model, its table or its names.
    pub nc: Option<usize>,
    /// The model table.
    pub model_table: Option<Value>,
    /// Training arguments.
    pub train_args: Option<Value>,
    /// Last finished epoch, from zero; -1 in a file that was stripped after training.
    pub epoch: Option<i64>,
    /// Which entry the tensors came from: `ema`, `model`, or empty for a bare dictionary of tensors.
    pub entry: String,
}

/// Reads a checkpoint file.
///
/// # Errors
/// Any damage, a storage that is missing or too short, an operation or type that is not allowed, a size beyond the limits,
/// or a file without a model.
pub fn read_file(path: &Path) -> Result<Checkpoint, WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    read(std::io::BufReader::new(file), length)
}

/// Reads a checkpoint of `length` bytes; see [`read_file`].
pub fn read<R: Read + Seek>(reader: R, length: u64) -> Result<Checkpoint, WeightsError> {
    let mut zip = ZipArchive::new(reader).map_err(|e| archive(format!("{e}")))?;
    let stream_name = zip
        .file_names()
        .filter(|name| *name == "data.pkl" || name.ends_with("/data.pkl"))
        .min_by_key(|name| name.len())
        .ok_or_else(|| archive("no data.pkl inside".to_string()))?
        .to_string();
    let top = stream_name.trim_end_matches("data.pkl").to_string();
    if let Some(order) = read_member(&mut zip, &format!("{top}byteorder"), 64)?
        && order != b"little"
    {
        return Err(archive("byte order is not little-endian".to_string()));
    }
    let stream = read_member(&mut zip, &stream_name, STREAM_MAX)?
        .ok_or_else(|| archive("no data.pkl inside".to_string()))?;
    let pickle = Pickle::parse(&stream)?;
    let reader = Reader {
        pickle: &pickle,
        zip,
        top,
        storages: HashMap::new(),
        storage_budget: length,
        output_budget: length.saturating_mul(EXPANSION_MAX),
        work: 0,
    };
    reader.checkpoint()
}

fn archive(reason: String) -> WeightsError {
    WeightsError::Archive { reason }
}

/// Bytes of a member, `None` if there is no such member.
fn read_member<R: Read + Seek>(
    zip: &mut ZipArchive<R>,
    name: &str,
    limit: u64,
) -> Result<Option<Vec<u8>>, WeightsError> {
    let member = match zip.by_name(name) {
        Ok(member) => member,
        Err(zip::result::ZipError::FileNotFound) => return Ok(None),
        Err(e) => return Err(archive(format!("member {name:?}: {e}"))),
    };
    let mut bytes = Vec::new();
    member.take(limit + 1).read_to_end(&mut bytes).map_err(|e| archive(format!("member {name:?}: {e}")))?;
    if bytes.len() as u64 > limit {
        return Err(WeightsError::Limit { what: format!("archive member {name:?}"), limit: limit as usize });
    }
    Ok(Some(bytes))
}

struct Reader<'a, R: Read + Seek> {
    pickle: &'a Pickle,
    zip: ZipArchive<R>,
    top: String,
    storages: HashMap<String, Rc<Vec<u8>>>,
    storage_budget: u64,
    output_budget: u64,
    work: usize,
}

impl<R: Read + Seek> Reader<'_, R> {
    fn checkpoint(mut self) -> Result<Checkpoint, WeightsError> {
        let root = self.pickle.root();
        let mut out = Checkpoint::default();
        let entry = ["ema", "model", "state_dict"].into_iter().find_map(|key| {
            let id = self.pickle.lookup(root, key)?;
            (!matches!(self.pickle.node(id), Node::None)).then_some((key, id))
        });
        let (entry, model) = entry.unwrap_or(("", root));
        out.entry = entry.to_string();
        let mut found = Vec::new();
        if self.state(model).is_some_and(|state| self.pickle.lookup(state, "_modules").is_some()) {
            self.walk(model, "", 0, &mut HashSet::new(), &mut found)?;
            self.read_model(model, &mut out)?;
        } else if let Some(pairs) = self.pickle.pairs(model) {
            for (key, value) in pairs {
                if let (Some(name), true) = (self.pickle.text(*key), self.is_tensor(*value)) {
                    found.push((name.to_string(), *value));
                }
            }
        }
        if found.is_empty() {
            return Err(WeightsError::Model {
                reason: "no tensors under ema, model or the top level".to_string(),
            });
        }
        for (name, id) in found {
            let tensor = self.tensor(&name, id)?;
            out.tensors.insert(name, tensor);
        }
        out.epoch = self.pickle.lookup(root, "epoch").and_then(|id| self.pickle.integer(id));
        if let Some(id) = self.pickle.lookup(root, "train_args") {
            out.train_args = Some(self.plain(id, 0)?);
        }
        Ok(out)
    }

    /// The dictionary of attributes of an object.
    fn state(&self, id: Id) -> Option<Id> {
        match self.pickle.node(id) {
            Node::Object { state: Some(state), .. } => Some(match self.pickle.node(*state) {
                // (attributes, slots)
                Node::Tuple(parts) => *parts.first()?,
                _ => *state,
            }),
            _ => None,
        }
    }

    /// Collects parameters and buffers of a module and its children under their dotted names.
    fn walk(
        &mut self,
        module: Id,
        prefix: &str,
        depth: usize,
        path: &mut HashSet<Id>,
        found: &mut Vec<(String, Id)>,
    ) -> Result<(), WeightsError> {
        if depth > DEPTH_MAX || !path.insert(module) {
            return Err(WeightsError::Model { reason: "modules nest without end".to_string() });
        }
        let pickle = self.pickle;
        if let Some(state) = self.state(module) {
            self.spend(16 + pickle.pairs(state).map_or(0, <[_]>::len))?;
            let transient: Vec<&str> = pickle
                .lookup(state, "_non_persistent_buffers_set")
                .and_then(|id| self.members(id))
                .map(|members| members.iter().filter_map(|id| pickle.text(*id)).collect())
                .unwrap_or_default();
            for (table, skip) in [("_parameters", &[][..]), ("_buffers", &transient)] {
                let pairs = pickle.lookup(state, table).and_then(|id| pickle.pairs(id)).unwrap_or(&[]);
                for (key, value) in pairs {
                    let Some(name) = pickle.text(*key) else { continue };
                    self.spend(1 + prefix.len() + name.len() + skip.len())?;
                    if self.is_tensor(*value) && !skip.contains(&name) {
                        found.push((format!("{prefix}{name}"), *value));
                    }
                }
            }
            let children = pickle.lookup(state, "_modules").and_then(|id| pickle.pairs(id)).unwrap_or(&[]);
            for (key, value) in children {
                if let Some(name) = pickle.text(*key)
                    && !matches!(pickle.node(*value), Node::None)
                {
                    self.spend(1 + prefix.len() + name.len())?;
                    self.walk(*value, &format!("{prefix}{name}."), depth + 1, path, found)?;
                }
            }
        }
        path.remove(&module);
        Ok(())
    }

    fn spend(&mut self, steps: usize) -> Result<(), WeightsError> {
        self.work += steps;
        if self.work > WORK_MAX {
            return Err(WeightsError::Limit {
                what: "work on the checkpoint's objects".to_string(),
                limit: WORK_MAX,
            });
        }
        Ok(())
    }

    /// Members of a set, which is written as a call with a list.
    fn members(&self, id: Id) -> Option<&[Id]> {
        match self.pickle.node(id) {
            Node::Object { arguments, .. } => {
                self.pickle.sequence(*self.pickle.sequence(*arguments)?.first()?)
            }
            _ => self.pickle.sequence(id),
        }
    }

    /// Class names, table and class count from the model's attributes.
    fn read_model(&mut self, model: Id, out: &mut Checkpoint) -> Result<(), WeightsError> {
        let Some(state) = self.state(model) else { return Ok(()) };
        let pickle = self.pickle;
        if let Some(names) = pickle.lookup(state, "names") {
            let mut list: Vec<(i64, String)> = Vec::new();
            let text =
                |id: &Id| pickle.text(*id).filter(|text| text.len() <= CLASS_NAME_MAX).map(str::to_string);
            if let Some(pairs) = pickle.pairs(names) {
                list.extend(pairs.iter().filter_map(|(k, v)| Some((pickle.integer(*k)?, text(v)?))));
                list.sort();
                list.dedup_by_key(|(index, _)| *index);
            } else if let Some(items) = pickle.sequence(names) {
                list.extend(items.iter().enumerate().filter_map(|(i, v)| Some((i as i64, text(v)?))));
            }
            if list.iter().enumerate().all(|(i, (index, _))| i as i64 == *index) {
                out.class_names = list.into_iter().map(|(_, name)| name).collect();
            }
        }
        if let Some(table) = pickle.lookup(state, "yaml") {
            out.model_table = Some(self.plain(table, 0)?);
        }
        let own = pickle.lookup(state, "nc").and_then(|id| pickle.integer(id));
        let in_table = out.model_table.as_ref().and_then(|table| table.get("nc")).and_then(Value::as_i64);
        out.nc = own.or(in_table).and_then(|nc| usize::try_from(nc).ok()).or(match out.class_names.len() {
            0 => None,
            count => Some(count),
        });
        Ok(())
    }

    /// A plain value as JSON; objects that are not plain become null, a namespace becomes its attributes.
    fn plain(&mut self, id: Id, depth: usize) -> Result<Value, WeightsError> {
        self.spend(1)?;
        if depth > DEPTH_MAX {
            return Err(WeightsError::Model { reason: "a plain value nests without end".to_string() });
        }
        let pickle = self.pickle;
        if let Some(pairs) = pickle.pairs(id).filter(|pairs| !pairs.is_empty()).or(match pickle.node(id) {
            Node::Object { .. } => self.state(id).and_then(|state| pickle.pairs(state)),
            _ => None,
        }) {
            let mut map = serde_json::Map::new();
            for (key, value) in pairs {
                self.spend(1 + pickle.text(*key).map_or(0, str::len))?;
                let key = match pickle.node(*key) {
                    Node::Str(text) => text.to_string(),
                    Node::Int(number) => number.to_string(),
                    _ => continue,
                };
                let value = self.plain(*value, depth + 1)?;
                map.insert(key, value);
            }
            return Ok(Value::Object(map));
        }
        Ok(match pickle.node(id) {
            Node::Bool(value) => Value::Bool(*value),
            Node::Int(value) => (*value).into(),
            Node::Float(value) => serde_json::Number::from_f64(*value).map_or(Value::Null, Value::Number),
            Node::Str(text) => {
                self.spend(text.len())?;
                Value::String(text.to_string())
            }
            Node::Dict(_) => Value::Object(serde_json::Map::new()),
            Node::Tuple(items) | Node::List(items) => {
                Value::Array(items.iter().map(|item| self.plain(*item, depth + 1)).collect::<Result<_, _>>()?)
            }
            _ => Value::Null,
        })
    }

    /// Callee and arguments of a call.
    fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        match self.pickle.node(id) {
            Node::Object { callee, arguments, .. } => {
                let (module, name) = self.pickle.global(*callee)?;
                let known = matches!(module, "torch._utils" | "torch");
                known.then_some((name, self.pickle.sequence(*arguments)?))
            }
            _ => None,
        }
    }

    fn is_tensor(&self, id: Id) -> bool {
        self.call(id).is_some_and(|(name, _)| {
            matches!(name, "_rebuild_tensor_v2" | "_rebuild_parameter" | "_rebuild_parameter_with_state")
        })
    }

    /// Reads the tensor at `id`, densely and in row-major order.
    fn tensor(&mut self, name: &str, id: Id) -> Result<Tensor, WeightsError> {
        let fault =
            |reason: &str| WeightsError::Tensor { name: name.to_string(), reason: reason.to_string() };
        let pickle = self.pickle;
        let (function, mut arguments) = self.call(id).ok_or_else(|| fault("is not a tensor"))?;
        if function != "_rebuild_tensor_v2" {
            let inner = *arguments.first().ok_or_else(|| fault("is an empty parameter"))?;
            arguments = match self.call(inner) {
                Some(("_rebuild_tensor_v2", arguments)) => arguments,
                _ => return Err(fault("is a parameter without tensor")),
            };
        }
        let &[storage, offset, size, stride, ..] = arguments else { return Err(fault("is incomplete")) };
        let sizes = self.extents(size).ok_or_else(|| fault("has a malformed shape"))?;
        let strides = self.extents(stride).ok_or_else(|| fault("has malformed strides"))?;
        let offset = pickle.integer(offset).and_then(|v| usize::try_from(v).ok());
        let offset = offset.ok_or_else(|| fault("has a malformed offset"))?;
        if sizes.len() != strides.len() {
            return Err(fault("has as many strides as dimensions only in part"));
        }
        // Copies out of the borrowed arguments are done; the storage may be loaded now.
        let (dtype, bytes) = self.storage(name, storage)?;
        let held = bytes.len() / dtype.bytes();
        let elements = sizes.iter().try_fold(1usize, |n, side| n.checked_mul(*side));
        let elements = elements.filter(|n| *n <= held).ok_or_else(|| fault("is larger than its storage"))?;
        if elements > 0 {
            let last = sizes
                .iter()
                .zip(&strides)
                .try_fold(offset, |at, (side, stride)| at.checked_add((side - 1).checked_mul(*stride)?));
            if last.is_none_or(|last| last >= held) {
                return Err(fault("reaches beyond its storage"));
            }
        }
        let integer = !matches!(dtype, Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64);
        let out_dtype = if integer { Dtype::I64 } else { Dtype::F32 };
        let cost = (elements * out_dtype.bytes()) as u64;
        self.output_budget = self.output_budget.checked_sub(cost).ok_or_else(|| WeightsError::Limit {
            what: "sum of tensors in the checkpoint, per byte of file".to_string(),
            limit: EXPANSION_MAX as usize,
        })?;
        let mut out = Vec::with_capacity(cost as usize);
        for_each_element(&sizes, &strides, offset, elements, |at| {
            if integer {
                out.extend_from_slice(&(dtype.read(&bytes, at) as i64).to_le_bytes());
            } else {
                out.extend_from_slice(&(dtype.read(&bytes, at) as f32).to_le_bytes());
            }
        });
        Ok(Tensor::new(out_dtype, sizes, out))
    }

    /// Non-negative integers of a tuple, or of a size object around one.
    fn extents(&self, id: Id) -> Option<Vec<usize>> {
        let items = match self.pickle.node(id) {
            Node::Object { arguments, .. } => {
                self.pickle.sequence(*self.pickle.sequence(*arguments)?.first()?)?
            }
            _ => self.pickle.sequence(id)?,
        };
        if items.len() > RANK_MAX {
            return None;
        }
        items.iter().map(|item| usize::try_from(self.pickle.integer(*item)?).ok()).collect()
    }

    /// Type and bytes of a storage, loaded once.
    fn storage(&mut self, name: &str, id: Id) -> Result<(Dtype, Rc<Vec<u8>>), WeightsError> {
        let fault = |reason: String| WeightsError::Tensor { name: name.to_string(), reason };
        let pickle = self.pickle;
        let parts = match pickle.node(id) {
            Node::Persistent(inner) => pickle.sequence(*inner),
            _ => None,
        };
        let Some(&[tag, kind, key, ..]) = parts else {
            return Err(fault("has no storage".to_string()));
        };
        let (Some("storage"), Some((_, kind)), Some(key)) =
            (pickle.text(tag), pickle.global(kind), pickle.text(key))
        else {
            return Err(fault("has a malformed storage".to_string()));
        };
        let dtype = match kind {
            "FloatStorage" => Dtype::F32,
            "HalfStorage" => Dtype::F16,
            "BFloat16Storage" => Dtype::Bf16,
            "DoubleStorage" => Dtype::F64,
            "LongStorage" => Dtype::I64,
            "IntStorage" => Dtype::I32,
            "ShortStorage" => Dtype::I16,
            "CharStorage" => Dtype::I8,
            "ByteStorage" => Dtype::U8,
            "BoolStorage" => Dtype::Bool,
            other => return Err(fault(format!("has a storage of type {other:?}, which is not supported"))),
        };
        if let Some(bytes) = self.storages.get(key) {
            return Ok((dtype, bytes.clone()));
        }
        let member = format!("{}data/{key}", self.top);
        let bytes = read_member(&mut self.zip, &member, self.storage_budget)?
            .ok_or_else(|| fault(format!("refers to storage {key:?}, which is missing")))?;
        self.storage_budget -= bytes.len() as u64;
        let bytes = Rc::new(bytes);
        self.storages.insert(key.to_string(), bytes.clone());
        Ok((dtype, bytes))
    }
}

/// Calls `visit(storage index)` for each element in row-major order.
fn for_each_element(
    sizes: &[usize],
    strides: &[usize],
    offset: usize,
    elements: usize,
    mut visit: impl FnMut(usize),
) {
    let mut index = vec![0usize; sizes.len()];
    let mut at = offset;
    for _ in 0..elements {
        visit(at);
        for axis in (0..sizes.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < sizes[axis] {
                break;
            }
            at -= strides[axis] * sizes[axis];
            index[axis] = 0;
        }
    }
}
