//! The part of Python's pickle format that state dicts use.

use std::rc::Rc;

use safetensors::Dtype;

/// A value of a pickle, as far as checkpoints need it.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Integer(i64),
    Text(Rc<str>),
    Tuple(Rc<[Value]>),
    Dict(Vec<(Value, Value)>),
    /// `module.name`.
    Global(Rc<str>),
    Storage(Storage),
    Tensor(Rc<Tensor>),
    /// Whatever is not looked into.
    Other,
}

/// One of the archive's raw arrays.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub(super) key: Rc<str>,
    pub(super) dtype: Dtype,
}

/// A tensor in a storage; offset and strides in elements.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What the stack holds: values, and marks where collections begin.
enum Slot {
    Value(Value),
    Mark,
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Slot>,
    memo: Vec<(usize, Value)>,
}

/// The pickled value.
pub(super) fn read(bytes: &[u8]) -> Result<Value, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::new(),
        memo: Vec::new(),
    };
    loop {
        let at = machine.at;
        let code = machine.take(1).map(|b| b[0]);
        match code.and_then(|code| machine.step(code)) {
            Some(None) => {}
            Some(Some(value)) => return Ok(value),
            None => {
                return Err(format!(
                    "data.pkl is damaged or of a kind not known, at byte {at}"
                ));
            }
        }
    }
}

impl Machine<'_> {
    /// Carries out one instruction. `None` is an error, `Some(Some(_))` the end.
    fn step(&mut self, code: u8) -> Option<Option<Value>> {
        let value = match code {
            b'.' => return Some(Some(self.pop()?)),
            b'(' => {
                self.stack.push(Slot::Mark);
                return Some(None);
            }
            // Protocol and frames say nothing about values.
            0x80 => return self.take(1).map(|_| None),
            0x95 => return self.take(8).map(|_| None),
            b'0' => return self.pop().map(|_| None),
            b'N' | 0x88 | 0x89 => Value::Other, // None, True, False
            b'J' => Value::Integer(self.unsigned(4)? as u32 as i32 as i64),
            b'K' => Value::Integer(self.unsigned(1)? as i64),
            b'M' => Value::Integer(self.unsigned(2)? as i64),
            0x8a => self.long()?,
            b'G' => self.take(8).map(|_| Value::Other)?, // a float
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'U' => self.text(1)?,
            b'T' => self.text(4)?,
            b'B' => self.skip(4)?,
            b'C' => self.skip(1)?,
            b'}' => Value::Dict(Vec::new()),
            b']' | 0x8f => Value::Other, // a list, a set
            b')' => Value::Tuple(Rc::from([])),
            b't' => Value::Tuple(self.pop_to_mark()?.into()),
            0x85..=0x87 => self.short_tuple(usize::from(code - 0x84))?,
            // Appending to lists and sets, which are not looked into.
            b'a' => return self.pop().map(|_| None),
            b'e' | 0x90 => return self.pop_to_mark().map(|_| None),
            b's' => return self.set_items(true).map(|()| None),
            b'u' => return self.set_items(false).map(|()| None),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                Value::Global(format!("{module}.{name}").into())
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                Value::Global(format!("{module}.{name}").into())
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                call(&function, &arguments)?
            }
            // An object's attributes: a state dict's are metadata.
            b'b' => return self.pop().map(|_| None),
            b'Q' => {
                let id = self.pop()?;
                storage(&id)?
            }
            b'q' => return self.remember(1),
            b'r' => return self.remember(4),
            0x94 => {
                let key = self.memo.len();
                return self.store(key);
            }
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            _ => return None,
        };
        self.stack.push(Slot::Value(value));
        Some(None)
    }

    fn take(&mut self, count: usize) -> Option<&[u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn unsigned(&mut self, size: usize) -> Option<usize> {
        let bytes = self.take(size)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    }

    /// An integer of up to eight bytes, in two's complement.
    fn long(&mut self) -> Option<Value> {
        let size = self.unsigned(1)?;
        let bytes = self.take(size)?;
        if size > 8 {
            return Some(Value::Other);
        }
        let fill = if bytes.last().is_some_and(|b| *b >= 0x80) {
            0xff
        } else {
            0
        };
        let mut wide = [fill; 8];
        wide[..size].copy_from_slice(bytes);
        Some(Value::Integer(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, length_size: usize) -> Option<Value> {
        let length = self.unsigned(length_size)?;
        let text = String::from_utf8_lossy(self.take(length)?);
        Some(Value::Text(text.into()))
    }

    fn skip(&mut self, length_size: usize) -> Option<Value> {
        let length = self.unsigned(length_size)?;
        self.take(length).map(|_| Value::Other)
    }

    fn line(&mut self) -> Option<String> {
        let length = self
            .bytes
            .get(self.at..)?
            .iter()
            .position(|b| *b == b'\n')?;
        let line = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.at += 1;
        Some(line)
    }

    fn pop(&mut self) -> Option<Value> {
        match self.stack.pop()? {
            Slot::Value(value) => Some(value),
            Slot::Mark => None,
        }
    }

    fn pop_text(&mut self) -> Option<Rc<str>> {
        match self.pop()? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The values above the topmost mark, which goes with them.
    fn pop_to_mark(&mut self) -> Option<Vec<Value>> {
        let mark = self
            .stack
            .iter()
            .rposition(|slot| matches!(slot, Slot::Mark))?;
        let values = self.stack.drain(mark..).filter_map(|slot| match slot {
            Slot::Value(value) => Some(value),
            Slot::Mark => None,
        });
        Some(values.collect())
    }

    fn short_tuple(&mut self, size: usize) -> Option<Value> {
        let mut values = (0..size).map(|_| self.pop()).collect::<Option<Vec<_>>>()?;
        values.reverse();
        Some(Value::Tuple(values.into()))
    }

    /// Puts one pair, or all above the mark, into the dictionary below.
    fn set_items(&mut self, one: bool) -> Option<()> {
        let values = match one {
            true => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
            false => self.pop_to_mark()?,
        };
        if let Some(Slot::Value(Value::Dict(pairs))) = self.stack.last_mut() {
            let mut values = values.into_iter();
            while let (Some(key), Some(value)) = (values.next(), values.next()) {
                pairs.push((key, value));
            }
        }
        Some(())
    }

    fn remember(&mut self, size: usize) -> Option<Option<Value>> {
        let key = self.unsigned(size)?;
        self.store(key)
    }

    /// Keeps the topmost value under `key`. Dictionaries are kept empty: a checkpoint never refers to
    /// one again.
    fn store(&mut self, key: usize) -> Option<Option<Value>> {
        let value = match self.stack.last()? {
            Slot::Value(Value::Dict(_)) => Value::Other,
            Slot::Value(value) => value.clone(),
            Slot::Mark => return None,
        };
        // Keys count up; anything else is searched for.
        self.memo.push((key, value));
        Some(None)
    }

    fn recall(&mut self, size: usize) -> Option<Value> {
        let key = self.unsigned(size)?;
        if let Some((found, value)) = self.memo.get(key)
            && *found == key
        {
            return Some(value.clone());
        }
        let found = self.memo.iter().rev().find(|(found, _)| *found == key);
        found.map(|(_, value)| value.clone())
    }
}

/// The calls that build tensors and their dictionaries; the results of others are not looked into.
fn call(function: &Value, arguments: &Value) -> Option<Value> {
    let (Value::Global(name), Value::Tuple(arguments)) = (function, arguments) else {
        return Some(Value::Other);
    };
    Some(match name.as_ref() {
        "collections.OrderedDict" => Value::Dict(Vec::new()),
        "torch._utils._rebuild_tensor_v2" => tensor(arguments)?,
        "torch._utils._rebuild_parameter" => arguments.first()?.clone(),
        _ => Value::Other,
    })
}

/// `_rebuild_tensor_v2(storage, offset, size, stride, ...)`.
fn tensor(arguments: &[Value]) -> Option<Value> {
    let [
        Value::Storage(storage),
        Value::Integer(offset),
        Value::Tuple(shape),
        Value::Tuple(strides),
        ..,
    ] = arguments
    else {
        return None;
    };
    let sizes = |values: &[Value]| -> Option<Vec<usize>> {
        let size = |value: &Value| match value {
            Value::Integer(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        values.iter().map(size).collect()
    };
    let (shape, strides) = (sizes(shape)?, sizes(strides)?);
    if shape.len() != strides.len() {
        return None;
    }
    Some(Value::Tensor(Rc::new(Tensor {
        storage: storage.clone(),
        offset: usize::try_from(*offset).ok()?,
        shape,
        strides,
    })))
}

/// `("storage", type, key, place, length)`.
fn storage(id: &Value) -> Option<Value> {
    let Value::Tuple(parts) = id else {
        return None;
    };
    let [
        Value::Text(kind),
        Value::Global(class),
        Value::Text(key),
        ..,
    ] = parts.as_ref()
    else {
        return None;
    };
    if kind.as_ref() != "storage" {
        return None;
    }
    let dtype = match class.rsplit('.').next()? {
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "DoubleStorage" => Dtype::F64,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    };
    Some(Value::Storage(Storage {
        key: key.clone(),
        dtype,
    }))
}
