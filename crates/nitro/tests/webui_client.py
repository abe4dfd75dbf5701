"""The `webuiapi` package, a client of AUTOMATIC1111's API, against `nitro serve`:
python webui_client.py PORT KEY."""

import sys

import webuiapi

port, key = sys.argv[1:]
# It asks for the scripts when it is made, and sends the key as a password.
api = webuiapi.WebUIApi(port=int(port), sampler="Euler", steps=2, username="u", password=key)

assert api.util_get_sampler_names() == ["Euler"]
assert api.util_get_scheduler_names()
models = api.util_get_model_names()
assert api.util_get_current_model() in models, models
api.util_set_model(models[0])
for menu in [
    api.get_upscalers,
    api.get_latent_upscale_modes,
    api.get_loras,
    api.get_hypernetworks,
    api.get_face_restorers,
    api.get_realesrgan_models,
    api.get_prompt_styles,
    api.get_sd_vae,
]:
    assert menu() == [], menu
assert api.get_embeddings()["loaded"] == {}
api.refresh_checkpoints()
assert api.get_progress()["progress"] == 0

made = api.txt2img(prompt="a red circle", seed=7, width=128, height=128, cfg_scale=4.5, batch_size=2)
assert [image.size for image in made.images] == [(128, 128)] * 2
assert made.info["all_seeds"] == [7, 8], made.info
assert made.image.info["parameters"].startswith("a red circle"), made.image.info

told = api.png_info(made.image)
assert told.info == made.info["infotexts"][0], told.info
assert told.parameters["Seed"] == 7, told.parameters

changed = api.img2img(
    images=[made.image], prompt="a blue square", seed=1, width=128, height=128, denoising_strength=0.5
)
assert changed.image.size == (128, 128)
assert changed.image.tobytes() != made.image.tobytes()

api.interrupt()
api.skip()
try:
    api.txt2img(prompt="", width=128, height=128)
except RuntimeError as error:
    assert error.args[0] == 400, error
else:
    raise AssertionError("an empty prompt was taken")
print("ok")
