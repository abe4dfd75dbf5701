//! Python's pickle format, as far as plain data go: what flow_grpo's reward servers speak.
//!
//! Reading never builds anything but plain data: opcodes that would call Python are refused. Source
//! of the format: CPython's `Lib/pickletools.py`.

use std::collections::BTreeMap;

/// A plain value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
}

impl Value {
    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        let Self::Dict(items) = self else { return None };
        let found = items
            .iter()
            .find(|(k, _)| matches!(k, Self::Text(k) if k == key));
        found.map(|(_, value)| value)
    }

    /// The numbers of a list.
    pub(crate) fn numbers(&self) -> Option<Vec<f64>> {
        let Self::List(items) = self else { return None };
        let number = |value: &Value| match value {
            Self::Float(x) => Some(*x),
            Self::Int(x) => Some(*x as f64),
            Self::Bool(x) => Some(f64::from(u8::from(*x))),
            _ => None,
        };
        items.iter().map(number).collect()
    }

    /// A JSON value as Python's `json` module would give it.
    pub(crate) fn from_json(json: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match json {
            Json::Null => Self::None,
            Json::Bool(b) => Self::Bool(*b),
            Json::Number(n) => n
                .as_i64()
                .map_or(Self::Float(n.as_f64().unwrap_or(f64::NAN)), Self::Int),
            Json::String(s) => Self::Text(s.clone()),
            Json::Array(items) => Self::List(items.iter().map(Self::from_json).collect()),
            Json::Object(map) => Self::Dict(
                map.iter()
                    .map(|(k, v)| (Self::Text(k.clone()), Self::from_json(v)))
                    .collect(),
            ),
        }
    }
}

/// Writes a value in protocol 3, which every Python 3 reads.
pub(crate) fn dumps(value: &Value) -> Vec<u8> {
    let mut out = vec![0x80, 3];
    write(value, &mut out);
    out.push(b'.');
    out
}

fn write(value: &Value, out: &mut Vec<u8>) {
    let sized = |out: &mut Vec<u8>, code: u8, bytes: &[u8]| {
        out.push(code);
        out.extend((bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::None => out.push(b'N'),
        Value::Bool(b) => out.push(if *b { 0x88 } else { 0x89 }),
        Value::Int(i) => match i32::try_from(*i) {
            Ok(i) => {
                out.push(b'J');
                out.extend(i.to_le_bytes());
            }
            Err(_) => {
                out.extend([0x8a, 8]);
                out.extend(i.to_le_bytes());
            }
        },
        Value::Float(x) => {
            out.push(b'G');
            out.extend(x.to_be_bytes());
        }
        Value::Text(text) => sized(out, b'X', text.as_bytes()),
        Value::Bytes(bytes) => sized(out, b'B', bytes),
        Value::List(items) => {
            out.extend(b"](");
            items.iter().for_each(|item| write(item, out));
            out.push(b'e');
        }
        Value::Dict(items) => {
            out.extend(b"}(");
            for (key, value) in items {
                write(key, out);
                write(value, out);
            }
            out.push(b'u');
        }
    }
}

/// Reads a pickle of plain data.
///
/// # Errors
/// When the data end early, or hold anything but plain data.
pub(crate) fn loads(data: &[u8]) -> Result<Value, String> {
    let mut reader = Reader {
        data,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: BTreeMap::new(),
    };
    reader.run()
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: BTreeMap<u32, Value>,
}

impl Reader<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            let place = self.at;
            let code = self.take(1)?[0];
            match code {
                b'.' => return self.pop(),
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'N' => self.stack.push(Value::None),
                0x88 => self.stack.push(Value::Bool(true)),
                0x89 => self.stack.push(Value::Bool(false)),
                b'K' => self.int(1)?,
                b'M' => self.int(2)?,
                b'J' => {
                    let bytes = self.array::<4>()?;
                    self.stack
                        .push(Value::Int(i32::from_le_bytes(bytes).into()));
                }
                0x8a => {
                    let count = self.size(1)?;
                    let bytes = self.take(count)?;
                    if count > 8 {
                        return Err("an integer of more than 64 bits".into());
                    }
                    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                    let mut wide = [if negative { 0xff } else { 0 }; 8];
                    wide[..count].copy_from_slice(bytes);
                    self.stack.push(Value::Int(i64::from_le_bytes(wide)));
                }
                b'G' => {
                    let bytes = self.array::<8>()?;
                    self.stack.push(Value::Float(f64::from_be_bytes(bytes)));
                }
                0x8c => self.text(1)?,
                b'X' => self.text(4)?,
                0x8d => self.text(8)?,
                b'C' => self.bytes(1)?,
                b'B' => self.bytes(4)?,
                0x8e => self.bytes(8)?,
                b']' | b')' => self.stack.push(Value::List(Vec::new())),
                b'}' => self.stack.push(Value::Dict(Vec::new())),
                b'(' => self.marks.push(self.stack.len()),
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(vec![key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set(items)?;
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.stack.push(Value::List(items));
                }
                0x85..=0x87 => {
                    let count = usize::from(code - 0x84);
                    let from = self.stack.len().checked_sub(count);
                    let from = from.ok_or("a tuple of more than there is")?;
                    let items = self.stack.split_off(from);
                    self.stack.push(Value::List(items));
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'q' => {
                    let key = self.size(1)? as u32;
                    self.remember(key)?;
                }
                b'r' => {
                    let key = self.size(4)? as u32;
                    self.remember(key)?;
                }
                b'h' => self.recall(1)?,
                b'j' => self.recall(4)?,
                other => {
                    return Err(format!(
                        "opcode {other:#04x} at byte {place} is not plain data (numbers, text, bytes, \
                         lists, dictionaries); the server must convert arrays and objects"
                    ));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let end = self
            .at
            .checked_add(count)
            .filter(|end| *end <= self.data.len());
        let end = end.ok_or_else(|| format!("the data end at byte {}", self.data.len()))?;
        let bytes = &self.data[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// An unsigned integer of `width` bytes.
    fn size(&mut self, width: usize) -> Result<usize, String> {
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(self.take(width)?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|e| e.to_string())
    }

    fn int(&mut self, width: usize) -> Result<(), String> {
        let value = self.size(width)? as i64;
        self.stack.push(Value::Int(value));
        Ok(())
    }

    fn text(&mut self, width: usize) -> Result<(), String> {
        let count = self.size(width)?;
        let text = String::from_utf8(self.take(count)?.to_vec()).map_err(|e| e.to_string())?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn bytes(&mut self, width: usize) -> Result<(), String> {
        let count = self.size(width)?;
        let bytes = self.take(count)?.to_vec();
        self.stack.push(Value::Bytes(bytes));
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack
            .pop()
            .ok_or_else(|| "nothing is on the stack".into())
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len());
        let mark = mark.ok_or("no mark is on the stack")?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.stack.last_mut() {
            Some(Value::List(list)) => list.extend(items),
            _ => return Err("items without a list".into()),
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<Value>) -> Result<(), String> {
        let Some(Value::Dict(dict)) = self.stack.last_mut() else {
            return Err("items without a dictionary".into());
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            dict.push((key, value));
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Result<(), String> {
        let value = self.stack.last().cloned().ok_or("nothing to remember")?;
        self.memo.insert(key, value);
        Ok(())
    }

    /// Only values that cannot have changed since they were remembered.
    fn recall(&mut self, width: usize) -> Result<(), String> {
        let key = self.size(width)? as u32;
        match self.memo.get(&key) {
            Some(Value::List(_) | Value::Dict(_)) => Err("a list that stands in two places".into()),
            Some(value) => {
                self.stack.push(value.clone());
                Ok(())
            }
            None => Err(format!("memo {key} was never set")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let text = |s: &str| Value::Text(s.into());
        let value = Value::Dict(vec![
            (
                text("a"),
                Value::List(vec![Value::Float(0.25), Value::Int(-3)]),
            ),
            (text("b"), Value::Bytes(vec![0, 255])),
            (text("c"), Value::Bool(true)),
            (text("d"), Value::Int(1 << 40)),
            (text("e"), Value::None),
        ]);
        assert_eq!(loads(&dumps(&value)).unwrap(), value);
        assert_eq!(value.get("a").unwrap().numbers().unwrap(), [0.25, -3.0]);
        assert_eq!(value.get("b").unwrap().numbers(), None);
    }

    /// `pickle.dumps({"scores": [0.5, 1, 0.5, True], "group": {"x": [1.0], "y": []}, "scores2": ()},
    /// protocol=4)` of CPython 3.11.
    const PYTHON: &[u8] = b"\x80\x04\x95T\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x06scores\x94]\x94\
        (G?\xe0\x00\x00\x00\x00\x00\x00K\x01G?\xe0\x00\x00\x00\x00\x00\x00\x88e\x8c\x05group\x94}\x94\
        (\x8c\x01x\x94]\x94G?\xf0\x00\x00\x00\x00\x00\x00a\x8c\x01y\x94]\x94u\x8c\x07scores2\x94)u.";

    #[test]
    fn what_python_writes_is_read() {
        let value = loads(PYTHON).unwrap();
        let scores = value.get("scores").unwrap().numbers().unwrap();
        assert_eq!(scores, [0.5, 1.0, 0.5, 1.0]);
        let group = value.get("group").unwrap();
        assert_eq!(group.get("x").unwrap().numbers().unwrap(), [1.0]);
        assert_eq!(group.get("y").unwrap().numbers().unwrap(), [0.0; 0]);
    }

    #[test]
    fn nothing_is_called_and_nothing_panics() {
        // os.system("true"), protocol 0 and 4.
        for evil in [
            &b"cos\nsystem\n(S'true'\ntR."[..],
            b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
        ] {
            let error = loads(evil).unwrap_err();
            assert!(error.contains("not plain data"), "{error}");
        }
        for cut in 0..PYTHON.len() {
            assert!(loads(&PYTHON[..cut]).is_err());
        }
        for bad in [
            &b"."[..],
            b"e.",
            b"a.",
            b"u.",
            b"s.",
            b"\x87.",
            b"h\x00.",
            b"(e.",
        ] {
            assert!(loads(bad).is_err());
        }
    }
}
