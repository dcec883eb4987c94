//! An interpreter of the object stream inside the reference's checkpoints that executes nothing.
//!
//! Classes and functions become inert records of their names; calls become records of callee and arguments. All
//! objects live in one arena and refer to each other by index, so neither cycles nor depth can hurt. Size of the stream
//! and number of objects are limited.

use std::collections::HashMap;
use std::rc::Rc;

use super::WeightsError;

/// Longest stream accepted, bytes.
const STREAM_MAX: usize = 64 << 20;
/// Most objects accepted.
const NODES_MAX: usize = 4_000_000;

/// Index of an object in its [`Pickle`].
pub type Id = usize;

/// One object.
#[derive(Clone, Debug)]
pub enum Node {
    /// `None`.
    None,
    /// A boolean.
    Bool(bool),
    /// An integer (those beyond 64 bits are refused).
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Str(Rc<str>),
    /// Bytes, content dropped: nothing that is read needs them.
    Bytes,
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list or set.
    List(Vec<Id>),
    /// A dictionary, in the order written.
    Dict(Vec<(Id, Id)>),
    /// A class or function, never looked up.
    Global {
        /// Module.
        module: Rc<str>,
        /// Name.
        name: Rc<str>,
    },
    /// What calling something would have made.
    Object {
        /// The callee.
        callee: Id,
        /// The arguments, a tuple.
        arguments: Id,
        /// State handed to it afterwards.
        state: Option<Id>,
        /// Key-value pairs set on it.
        items: Vec<(Id, Id)>,
    },
    /// A reference to data outside the stream.
    Persistent(Id),
}

/// A decoded stream.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// The outermost object.
    pub fn root(&self) -> Id {
        self.root
    }

    /// The object at `id`.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Text of a string.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.node(id) {
            Node::Str(text) => Some(text),
            _ => None,
        }
    }

    /// Value of an integer.
    pub fn integer(&self, id: Id) -> Option<i64> {
        match self.node(id) {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// Items of a tuple or list.
    pub fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Tuple(items) | Node::List(items) => Some(items),
            _ => None,
        }
    }

    /// Pairs of a dictionary, plain or made by a call (an ordered dictionary).
    pub fn pairs(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.node(id) {
            Node::Dict(pairs) => Some(pairs),
            Node::Object { items, .. } => Some(items),
            _ => None,
        }
    }

    /// Value under a string key of a dictionary; the last of equal keys counts.
    pub fn lookup(&self, id: Id, key: &str) -> Option<Id> {
        self.pairs(id)?.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }

    /// Module and name of a class or function.
    pub fn global(&self, id: Id) -> Option<(&str, &str)> {
        match self.node(id) {
            Node::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }

    /// Decodes a stream.
    pub fn parse(bytes: &[u8]) -> Result<Pickle, WeightsError> {
        if bytes.len() > STREAM_MAX {
            return Err(WeightsError::Limit {
                what: "checkpoint object stream".to_string(),
                limit: STREAM_MAX,
            });
        }
        let machine = Machine {
            bytes,
            at: 0,
            opcode_at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        machine.run()
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    opcode_at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

type Step<T> = Result<T, WeightsError>;

impl Machine<'_> {
    fn fault<T>(&self, reason: impl Into<String>) -> Step<T> {
        Err(WeightsError::Pickle { offset: self.opcode_at, reason: reason.into() })
    }

    fn take(&mut self, count: usize) -> Step<&[u8]> {
        match self.bytes.get(self.at..).and_then(|rest| rest.get(..count)) {
            Some(slice) => {
                self.at += count;
                Ok(slice)
            }
            None => self.fault("the stream ends inside an object"),
        }
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn length(&mut self, width: usize) -> Step<usize> {
        let value = self.take(width)?.iter().rev().fold(0u64, |value, byte| value << 8 | *byte as u64);
        usize::try_from(value).or_else(|_| self.fault("a length beyond the address space"))
    }

    fn line(&mut self) -> Step<Rc<str>> {
        let Some(length) = self.bytes[self.at..].iter().position(|b| *b == b'\n') else {
            return self.fault("a line without end");
        };
        let text = self.text(length)?;
        self.at += 1;
        Ok(text)
    }

    fn text(&mut self, length: usize) -> Step<Rc<str>> {
        // Names with lone surrogates exist in principle; none is needed, so they may read as replacement marks.
        Ok(String::from_utf8_lossy(self.take(length)?).into())
    }

    fn push(&mut self, node: Node) -> Step<()> {
        if self.nodes.len() >= NODES_MAX {
            return Err(WeightsError::Limit {
                what: "number of checkpoint objects".to_string(),
                limit: NODES_MAX,
            });
        }
        self.nodes.push(node);
        self.stack.push(self.nodes.len() - 1);
        Ok(())
    }

    fn pop(&mut self) -> Step<Id> {
        // Nothing below the last mark may be taken.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return self.fault("the stack is empty");
        }
        Ok(self.stack.pop().expect("longer than the floor"))
    }

    fn top(&self) -> Step<Id> {
        match self.stack.last() {
            Some(id) => Ok(*id),
            None => self.fault("the stack is empty"),
        }
    }

    /// Everything above the last mark, which is removed.
    fn since_mark(&mut self) -> Step<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => self.fault("no mark on the stack"),
        }
    }

    fn pairs_since_mark(&mut self) -> Step<Vec<(Id, Id)>> {
        let items = self.since_mark()?;
        if !items.len().is_multiple_of(2) {
            return self.fault("a key without value");
        }
        Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn tuple(&mut self, count: usize) -> Step<()> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Node::Tuple(items))
    }

    fn append(&mut self, items: Vec<Id>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::List(list) => list.extend(items),
            // A call that made a list-like object: what it holds is not read.
            Node::Object { .. } => {}
            _ => return self.fault("appending to something that is no list"),
        }
        Ok(())
    }

    fn set(&mut self, pairs: Vec<(Id, Id)>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::Dict(dict) => dict.extend(pairs),
            Node::Object { items, .. } => items.extend(pairs),
            _ => return self.fault("setting a key of something that is no dictionary"),
        }
        Ok(())
    }

    fn call(&mut self) -> Step<()> {
        let arguments = self.pop()?;
        let callee = self.pop()?;
        self.push(Node::Object { callee, arguments, state: None, items: Vec::new() })
    }

    fn build(&mut self) -> Step<()> {
        let new = self.pop()?;
        let target = self.top()?;
        if let Node::Object { state, .. } = &mut self.nodes[target] {
            *state = Some(new);
            return Ok(());
        }
        self.fault("a state for something that takes none")
    }

    fn remember(&mut self, key: usize) -> Step<()> {
        let id = self.top()?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Step<()> {
        match self.memo.get(&key) {
            // The stack is bounded by the length of the stream.
            Some(id) => self.stack.push(*id),
            None => return self.fault(format!("object {key} was never remembered")),
        }
        Ok(())
    }

    fn long(&mut self, length: usize) -> Step<()> {
        let offset = self.opcode_at;
        let bytes = self.take(length)?;
        if bytes.len() > 8 {
            return Err(WeightsError::Pickle { offset, reason: "an integer beyond 64 bits".to_string() });
        }
        let fill = if bytes.last().is_some_and(|b| *b >= 0x80) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(wide)))
    }

    fn run(mut self) -> Step<Pickle> {
        loop {
            self.opcode_at = self.at;
            let opcode = self.array::<1>()?[0];
            if opcode == b'.' {
                let root = self.pop()?;
                return Ok(Pickle { nodes: self.nodes, root });
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // Protocol and frames.
            0x80 => {
                let version = self.array::<1>()?[0];
                if version > 5 { self.fault(format!("protocol {version} is unknown")) } else { Ok(()) }
            }
            0x95 => self.take(8).map(|_| ()),
            // Constants.
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value as i64))
            }
            b'K' => {
                let value = self.length(1)?;
                self.push(Node::Int(value as i64))
            }
            b'M' => {
                let value = self.length(2)?;
                self.push(Node::Int(value as i64))
            }
            0x8a => {
                let length = self.length(1)?;
                self.long(length)
            }
            0x8b => {
                let length = self.length(4)?;
                self.long(length)
            }
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Node::Float(value))
            }
            b'X' | 0x8c | 0x8d => {
                let length = self.length(if opcode == b'X' {
                    4
                } else if opcode == 0x8c {
                    1
                } else {
                    8
                })?;
                let text = self.text(length)?;
                self.push(Node::Str(text))
            }
            b'T' | b'U' | b'B' | b'C' | 0x8e => {
                let length = self.length(match opcode {
                    b'U' | b'C' => 1,
                    0x8e => 8,
                    _ => 4,
                })?;
                self.take(length)?;
                self.push(Node::Bytes)
            }
            _ => self.step_structure(opcode),
        }
    }

    fn step_structure(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // Containers.
            b'}' => self.push(Node::Dict(Vec::new())),
            b']' | 0x8f => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b't' => {
                let items = self.since_mark()?;
                self.push(Node::Tuple(items))
            }
            b'l' | 0x91 => {
                let items = self.since_mark()?;
                self.push(Node::List(items))
            }
            b'd' => {
                let pairs = self.pairs_since_mark()?;
                self.push(Node::Dict(pairs))
            }
            0x85..=0x87 => self.tuple((opcode - 0x84) as usize),
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])
            }
            b'e' | 0x90 => {
                let items = self.since_mark()?;
                self.append(items)
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(vec![(key, value)])
            }
            b'u' => {
                let pairs = self.pairs_since_mark()?;
                self.set(pairs)
            }
            // The stack.
            b'0' => self.pop().map(|_| ()),
            b'1' => self.since_mark().map(|_| ()),
            b'2' => {
                let id = self.top()?;
                self.stack.push(id);
                Ok(())
            }
            _ => self.step_objects(opcode),
        }
    }

    fn step_objects(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // Memory.
            b'q' | b'r' => {
                let key = self.length(if opcode == b'q' { 1 } else { 4 })?;
                self.remember(key)
            }
            0x94 => self.remember(self.memo.len()),
            b'h' | b'j' => {
                let key = self.length(if opcode == b'h' { 1 } else { 4 })?;
                self.recall(key)
            }
            // Names, calls, state, outside data.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Node::Global { module, name })
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.nodes[module], &self.nodes[name]) {
                    (Node::Str(module), Node::Str(name)) => {
                        let global = Node::Global { module: module.clone(), name: name.clone() };
                        self.push(global)
                    }
                    _ => self.fault("a global without a name"),
                }
            }
            b'R' | 0x81 => self.call(),
            0x92 => {
                self.pop()?;
                self.call()
            }
            b'b' => self.build(),
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))
            }
            other => self.fault(format!("operation 0x{other:02x} is not allowed")),
        }
    }
}

#[cfg(test)]
mod tests;
