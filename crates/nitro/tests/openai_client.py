"""The official `openai` package against `nitro serve`: python openai_client.py URL KEY."""

import base64
import io
import struct
import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def size_of(png):
    assert png.startswith(b"\x89PNG"), png[:8]
    return struct.unpack(">II", png[16:24])


models = [model.id for model in client.models.list()]
assert models, "there is a model"

answer = client.images.generate(
    model=models[0],
    prompt="a red circle",
    n=2,
    size="128x128",
    response_format="b64_json",
    extra_body={"seed": 7, "num_inference_steps": 2},
)
pictures = [base64.b64decode(image.b64_json) for image in answer.data]
assert [size_of(picture) for picture in pictures] == [(128, 128)] * 2
assert pictures[0] != pictures[1]
assert answer.usage.total_tokens > 0

stream = client.images.generate(
    model=models[0],
    prompt="a red circle",
    stream=True,
    partial_images=2,
    extra_body={"seed": 7, "num_inference_steps": 6},
)
events = list(stream)
assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + [
    "image_generation.completed"
], events
assert [event.partial_image_index for event in events[:2]] == [0, 1]
assert size_of(base64.b64decode(events[-1].b64_json)) == (128, 128)

edited = client.images.edit(
    model=models[0],
    image=io.BytesIO(pictures[0]),
    prompt="a blue square",
    extra_body={"seed": 1, "num_inference_steps": 2, "strength": 0.5},
)
assert size_of(base64.b64decode(edited.data[0].b64_json)) == (128, 128)

# A mask, another format, events of an edit, and the same picture for the same seed.
again = client.images.edit(
    model=models[0],
    image=io.BytesIO(pictures[0]),
    mask=io.BytesIO(pictures[1]),
    prompt="a blue square",
    output_format="webp",
    extra_body={"seed": 1, "num_inference_steps": 2, "strength": 0.5},
)
assert base64.b64decode(again.data[0].b64_json).startswith(b"RIFF")
stream = client.images.edit(
    model=models[0],
    image=io.BytesIO(pictures[0]),
    prompt="a blue square",
    stream=True,
    partial_images=1,
    extra_body={"seed": 1, "num_inference_steps": 4, "strength": 0.5},
)
events = [event.type for event in stream]
assert events == ["image_edit.partial_image", "image_edit.completed"], events
same = client.images.generate(
    model=models[0],
    prompt="a red circle",
    extra_body={"seed": 8, "num_inference_steps": 2, "variant": "grpo"},
)
assert base64.b64decode(same.data[0].b64_json) == pictures[1]
raw = client.models.with_raw_response.list()
assert raw.headers["x-request-id"]


def refused(kind, **request):
    try:
        client.images.generate(**request)
    except kind as error:
        return error
    raise AssertionError(f"{request} was not refused")


error = refused(openai.BadRequestError, model=models[0], prompt="a", n=99)
assert error.param == "n" and error.code == "invalid_value", error.body
error = refused(openai.NotFoundError, model="no-such-model", prompt="a")
assert error.code == "model_not_found", error.body
client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong-key-0123456789", max_retries=0)
refused(openai.AuthenticationError, model=models[0], prompt="a")
print("ok")
