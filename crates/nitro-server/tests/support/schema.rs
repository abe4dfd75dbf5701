//! Checks JSON against the schemas of an OpenAPI 3.1 document: the keywords that this project's
//! document uses, and a failure on any other.

use serde_json::Value;

/// Checks an answer of `path` with this status.
pub(crate) fn check_response(api: &Value, method: &str, path: &str, status: u16, body: &Value) {
    let response = &api["paths"][path][method]["responses"][status.to_string()];
    assert!(
        response.is_object(),
        "{method} {path} does not document {status}"
    );
    let schema = &response["content"]["application/json"]["schema"];
    if let Err(why) = check(api, schema, body, "") {
        panic!("{method} {path} {status}: {why:.500}");
    }
}

/// Checks a value against a named schema.
pub(crate) fn check_schema(api: &Value, name: &str, value: &Value) {
    let schema = &api["components"]["schemas"][name];
    assert!(schema.is_object(), "no schema {name}");
    if let Err(why) = check(api, schema, value, "") {
        panic!("{name}: {why:.500}");
    }
}

fn check(api: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Some(object) = schema.as_object() else {
        return Err(format!("{at}: no schema"));
    };
    for (keyword, wanted) in object {
        match keyword.as_str() {
            "$ref" => {
                let pointer = wanted.as_str().unwrap_or_default().trim_start_matches('#');
                let target = api.pointer(pointer).ok_or(format!("{at}: no {pointer}"))?;
                check(api, target, value, at)?;
            }
            "type" => {
                let kinds: Vec<&str> = match wanted {
                    Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
                    kind => kind.as_str().into_iter().collect(),
                };
                if !kinds.iter().any(|kind| is(kind, value)) {
                    return Err(format!("{at}: {value} is no {kinds:?}"));
                }
            }
            "enum" => {
                if !wanted.as_array().is_some_and(|known| known.contains(value)) {
                    return Err(format!("{at}: {value} is none of {wanted}"));
                }
            }
            "required" => {
                for name in wanted
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                {
                    if value.is_object() && value.get(name).is_none() {
                        return Err(format!("{at}: no {name}"));
                    }
                }
            }
            "properties" => {
                for (name, schema) in wanted.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        check(api, schema, value, &format!("{at}/{name}"))?;
                    }
                }
                // A field that the document does not tell of is a mistake of the document.
                let mut names = value
                    .as_object()
                    .into_iter()
                    .flat_map(|object| object.keys());
                if let Some(name) = names.find(|name| wanted.get(name.as_str()).is_none()) {
                    return Err(format!("{at}: {name} is not documented"));
                }
            }
            "items" => {
                for (i, value) in value.as_array().into_iter().flatten().enumerate() {
                    check(api, wanted, value, &format!("{at}/{i}"))?;
                }
            }
            "oneOf" | "anyOf" => {
                let fits = wanted.as_array().into_iter().flatten();
                let fits = fits.filter(|s| check(api, s, value, at).is_ok()).count();
                if fits == 0 || (keyword == "oneOf" && fits > 1) {
                    return Err(format!("{at}: {fits} of the {keyword} fit {value}"));
                }
            }
            "minimum" => {
                if value.as_f64() < wanted.as_f64() {
                    return Err(format!("{at}: {value} is below {wanted}"));
                }
            }
            "description" | "format" | "example" | "examples" | "default" | "title" => {}
            "additionalProperties" | "propertyNames" => {}
            other => return Err(format!("{at}: this check knows no `{other}`")),
        }
    }
    Ok(())
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "null" => value.is_null(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}
