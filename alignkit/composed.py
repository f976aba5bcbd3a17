"""One stock pipeline with LoRAs, a ControlNet, concepts and AlignIT together.

    composed = alignkit.compose(
        "emoji", loras={"aesthetic": "runs/alignprop/emoji"}, controlnet="runs/depth", concepts=["runs/thing"]
    )
    composed("a <thing> left of a tree", control_image=depth, alignit=True, lora_scale={"aesthetic": 0.7}).images

The parts stand above each other in this order, and each sees those before it as its base:

1. the base model;
2. `loras`, styles such as AlignProp's: they belong to the base, so all of a prompt is drawn with them;
3. the weights of one customiser (LoRA, Custom Diffusion, DreamBooth), which are there for its concept;
4. the ControlNet. It reads plain text, the class noun in a concept's place, and none of the LoRAs changes it;
5. the concepts' rows of the text (Textual Inversion, P+, NeTI);
6. AlignIT, that gives 3 and 5 to the concepts' tokens alone: all others read 1 and 2.

Nothing is drawn by code of ours: the stock pipeline's `__call__` is, with what each part has of its own
(`set_adapters`, `concepts.Concepts.applied`, `alignit.alignit`) switched on around it and off behind it.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ControlNetModel
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AutoPipelineForText2Image
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from alignkit import customized
from alignkit.alignit import alignit as aligned
from alignkit.artifacts import network_of
from alignkit.base import Base, load_base, require_finite
from alignkit.concepts import Concepts
from alignkit.concepts.text import substitute
from alignkit.controlnet import check_fit, kind_of, load_controlnet
from alignkit.guidance import Ascent, RewardSearch, Score, as_ascent, draw_best, generators
from alignkit.refine import Refiner, build_refiner, refined
from alignkit.rewards import RewardConfig, WeightedRewards, build_reward, combine

Lora = str | Path | tuple[str | Path, float]


def compose(
    pipe: Any,
    *,
    base_config: str | None = None,
    loras: Mapping[str, Lora] | None = None,
    controlnet: Any = None,
    concepts: Sequence[Any] = (),
    alignit: bool | Mapping[str, Any] = False,
) -> "Composed":
    """A pipeline with all of these in it, which is called as the stock one is.

    pipe: a stock diffusers pipeline, or a base model as `load_base` takes it. What is loaded is loaded into its
        modules; outside of calls it draws what it drew before, and `Composed.unload` gives it back.
    base_config: of a base model that is a .safetensors file, `config` of `load_base`.
    loras: files or folders by names of yours, or (file, weight). They are styles: part of the base.
    controlnet: a folder or Hub name, a loaded ControlNet, or a list of these.
    concepts: folders of `training/neti.py` or `training/customize.py`, or a dict with the arguments of
        `customized.load` for files of others: {"path": ..., "phrase": "sks dog", "class_noun": "dog"}. At most one of
        them may change weights.
    alignit: whether calls use AlignIT unless they say otherwise; a dict has its settings.

    Of SD 1.x, SD 2.x and SDXL all parts; of SD3 and FLUX, `loras` and ControlNets.

    Raises ValueError for a file that is damaged, a pickle or of another base, and for parts that do not go together;
    the pipeline is as it was then.
    """
    if isinstance(pipe, (str, Path)):
        pipe = load_base(str(pipe), config=base_config)
    elif base_config is not None:
        raise ValueError(f"base_config goes with the name of a .safetensors file, got a {type(pipe).__name__}.")
    if isinstance(pipe, Base):
        pipe = pipe.pipeline()
    composed = Composed(pipe, alignit)
    try:
        composed._load(dict(loras or {}), controlnet, concepts)
    except BaseException:
        composed.unload()
        raise
    return composed


class Composed:
    """What `compose` returns. `pipe` is the stock pipeline that draws: its scheduler may be replaced, it may offload.

    loras: name -> weight. concepts: `customized.Customized`, by their phrases.
    """

    def __init__(self, pipe: Any, alignit: bool | Mapping[str, Any] = False):
        adapters = {name for names in _adapters(pipe).values() for name in names}
        if adapters:
            raise ValueError(
                f"This pipeline has the adapter {sorted(adapters)[0]!r} already: pass its file as one of the loras, or "
                "as a concept, after pipe.unload_lora_weights()."
            )
        self.base, self.alignit = pipe, alignit
        self._empty()

    def _empty(self) -> None:
        self.pipe = self.base
        self.loras: dict[str, float] = {}
        self.concepts: dict[str, customized.Customized] = {}
        self._customizer: customized.Customized | None = None
        self._customizer_adapters: list[str] = []
        self._processors: dict[str, Any] | None = None  # Custom Diffusion's, and a tokenizer with its token
        self._tokenizer: Any = None
        self._vocabulary: int | None = None  # rows of the token table before Custom Diffusion's

    # What it is made of

    def _load(self, loras: dict[str, Lora], controlnet: Any, concepts: Sequence[Any]) -> None:
        joint = getattr(self.base, "unet", None) is None
        if joint and (concepts or self.alignit):
            raise ValueError(
                f"A {type(self.base).__name__} mixes text and image in joint attention, so no token has keys and "
                "values of its own: concepts and AlignIT work with SD 1.x, SD 2.x and SDXL; LoRAs and ControlNets "
                "work here, too."
            )
        if isinstance(concepts, (str, Path, Mapping)):
            raise TypeError(f"concepts: expected a list, got {concepts!r}. Pass [concept].")
        for concept in concepts:
            self._load_concept(concept)
        for name, lora in loras.items():
            if not re.fullmatch(r"\w+", name) or name in self._customizer_adapters:
                raise ValueError(f"loras: expected names of letters, digits and _, other than 'default', got {name!r}.")
            path, weight = lora if isinstance(lora, tuple) else (lora, 1.0)
            for pipe in self._weighted:
                customized.load_lora_file(pipe, path, name)
            self.loras[name] = float(weight)
        if self.loras or self._customizer_adapters:
            for pipe in self._weighted:
                pipe.disable_lora()
        if controlnet is not None:
            self._load_controlnet(controlnet)
        if self.alignit:
            self._check_alignit()

    @property
    def _weighted(self) -> list[Any]:
        """The pipelines whose networks the LoRAs are loaded into: DreamBooth's stands beside the base."""
        own = self._customizer is not None and self._customizer.base is not None
        return [self.base, self._customizer.pipe] if own else [self.base]

    def _load_concept(self, concept: Any) -> None:
        given = dict(concept) if isinstance(concept, Mapping) else {"path": concept}
        if customized.changes_weights(given["path"]) and self._customizer is not None:
            raise ValueError(
                f"{given['path']} changes weights, as {self._customizer.concept.phrase!r} does, and neither would be "
                "drawn as it was learnt. One customiser's weights go together with any number of concepts of NeTI, P+ "
                "and Textual Inversion."
            )
        pipe, tokenizer, stock = self.base, self.base.tokenizer, self.base.unet.attn_processors
        if self._tokenizer is None:
            self._vocabulary = pipe.text_encoder.get_input_embeddings().num_embeddings
        pipe.tokenizer = copy.deepcopy(tokenizer)
        try:
            loaded = customized.load(pipe, **given)
        finally:
            own, pipe.tokenizer = pipe.tokenizer, tokenizer
            processors = pipe.unet.attn_processors
            changed = any(processors[name] is not stock[name] for name in stock)
            if changed:
                pipe.unet.set_attn_processor(dict(stock))
            if len(own) > len(tokenizer):
                self._tokenizer = own
        if loaded.concept.learned is None:
            self._customizer, self._processors = loaded, processors if changed else None
            self._customizer_adapters = sorted({name for names in _adapters(self.base).values() for name in names})
            self.pipe = loaded.pipe  # DreamBooth has one of its own
        phrase = loaded.concept.phrase
        if phrase in self.concepts:
            raise ValueError(f"Two concepts are called {phrase!r}: train one of them under another placeholder.")
        self.concepts[phrase] = loaded

    def _load_controlnet(self, controlnet: Any) -> None:
        several = isinstance(controlnet, (list, tuple))
        nets = [self._one_controlnet(net) for net in (controlnet if several else [controlnet])]
        if type(self.base) not in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() or hasattr(self.base, "controlnet"):
            raise ValueError(
                f"controlnet: expected a stock text-to-image pipeline to put it beside, got a "
                f"{type(self.base).__name__}. One that has a ControlNet takes no other."
            )
        device = getattr(self.pipe, "_offload_device", None) if getattr(self.pipe, "_all_hooks", None) else None
        self.pipe = AutoPipelineForText2Image.from_pipe(self.pipe, controlnet=nets if several else nets[0])
        self.pipe.set_progress_bar_config(**getattr(self.base, "_progress_bar_config", {}))
        if device is not None:
            self.pipe.enable_model_cpu_offload(device=device)

    def _one_controlnet(self, net: Any) -> nn.Module:
        unet = getattr(self.base, "unet", None)
        if isinstance(net, nn.Module):
            if unet is not None and isinstance(net, ControlNetModel):
                check_fit(net.config, unet, self.base.vae_scale_factor, "controlnet")
            return net
        network = getattr(self.base, "transformer", None) if unet is None else unet
        kind_of(network)  # refuses a pipeline that is of no family here
        loaded = load_controlnet(str(net), network, self.base.vae_scale_factor).requires_grad_(False).eval()
        return loaded if network.dtype == loaded.dtype else loaded.to(network.dtype)

    def unload(self) -> Any:
        """Takes out again what was loaded; returns the pipeline, as it was."""
        base = self.base
        if _adapters(base):
            base.unload_lora_weights()
        if self._tokenizer is not None:
            base.text_encoder.resize_token_embeddings(self._vocabulary)
        self.alignit = False
        self._empty()
        return base

    def offload(self, how: Literal["model", "sequential"], device: str | torch.device) -> None:
        """Keeps all parts in the CPU's memory, from where they visit `device` while they are at work.

        how: model, one part at a time, as a whole; sequential, layer by layer, which takes least memory and most time.

        As diffusers' enable_model_cpu_offload and enable_sequential_cpu_offload. A judge of `reward` takes no part.
        Raises ValueError for parts that do not come along.
        """
        self.check_offload(how)
        enable = {"model": self.pipe.enable_model_cpu_offload, "sequential": self.pipe.enable_sequential_cpu_offload}
        enable[how](device=device)

    def check_offload(self, how: Literal["model", "sequential"]) -> None:
        """Raises ValueError for parts that offloading would leave behind."""
        if self._customizer is not None and self._customizer.base is not None:
            raise ValueError(
                f"offload: {self._customizer.concept.phrase!r} is DreamBooth's, a second network beside the base's, "
                "and only one of them would be brought to the device. Draw it without, or from a LoRA."
            )
        if how == "sequential" and self._processors is not None:
            raise ValueError(
                f"offload: Custom Diffusion's weights of {self._customizer.concept.phrase!r} are put into the network "
                "for each call, where sequential offloading does not find them. Take model."
            )

    def to(self, *args: Any, **kwargs: Any) -> "Composed":
        """Moves and casts all parts, as a pipeline's `to`; returns itself."""
        for pipe in self._pipes:
            pipe.to(*args, **kwargs)
        return self

    @property
    def _pipes(self) -> list[Any]:
        """The pipeline that draws and, where that has parts of its own, the base's."""
        return [self.pipe] if self.pipe is self.base else [self.pipe, self.base]

    def follow(self, components: Mapping[str, Any], progress_bar_config: Mapping[str, Any]) -> None:
        """Takes over what was replaced in the pipeline that it draws for: a scheduler, a VAE, a compiled U-Net."""
        for pipe in self._pipes:
            pipe.set_progress_bar_config(**progress_bar_config)
        for name, part in components.items():
            old = getattr(self.base, name)
            for pipe in self._pipes if part is not old else ():
                if getattr(pipe, name) is old:
                    setattr(pipe, name, part)

    # What it does

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        control_image: Any = None,
        alignit: bool | Mapping[str, Any] | None = None,
        lora_scale: Mapping[str, float] | float | None = None,
        truncation: int | None = None,
        seed: int | None = None,
        refine: Refiner | str | None = None,
        reward: Any = None,
        best_of: int = 1,
        ascent: int | Mapping[str, Any] | Ascent = 0,
        reward_scale: float = 0.0,
        columns: Mapping[str, Sequence[Any]] | None = None,
        reward_prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> "Drawn":
        """The output of the stock pipeline, `.images`, with the prompts, seeds and rewards of what was drawn.

        control_image: for the ControlNet; a list for several.
        alignit: on, off, or on with these settings of `alignit.alignit`; as composed unless told.
        lora_scale: weights by the LoRAs' names, as composed where not told; a number is for all of them.
        truncation: units of NeTI's mappers that are kept: few are edited easily, all are most faithful.
        seed: image i is drawn from the noise of seed + i, on the CPU, so it does not depend on how many there are.
        refine: rewrites each prompt first: a function, or a text-generation model (`refine.build_refiner`).
        reward: what pictures are chosen or improved by: a name of `rewards.REWARDS`, a `Reward`, `WeightedRewards`, or
            a list of `RewardConfig`s. It is told the class noun in a concept's place, and the prompt as it was asked.
        best_of: draw each image this often, and return the one of the highest reward; image i is chosen among the seeds
            seed + best_of i, ...
        ascent: steps, or settings, of gradient ascent on the initial noise (`guidance.Ascent`).
        reward_scale: strength of the reward's gradient at every step (`guidance.steered`): 0.1 is much.
        columns: what the reward wants to know beside the prompts, a value a prompt.
        reward_prompt: what the reward is told in the prompt's place; prompt_embeds need it, as they are not text.
        options: of the stock pipeline (negative_prompt, num_inference_steps, guidance_scale, callbacks, ...).

        Raises ValueError for what this pipeline has no part for, FloatingPointError where a picture is not finite, as
        in float16 beyond its range. Warns where no concept is in the prompt.
        """
        asked, count = _listed(prompt, options), options.get("num_images_per_prompt") or 1
        if seed is not None and options.get("generator") is not None:
            raise ValueError("Pass a seed or a generator, not both.")
        if reward is None and (best_of != 1 or ascent or reward_scale):
            raise ValueError("best_of, ascent and reward_scale need a reward: pass reward=...")
        if reward is not None:
            told = asked if reward_prompt is None else _listed(reward_prompt, {})
            if (prompt is None and reward_prompt is None) or len(told) != len(asked):
                raise ValueError(
                    f"reward_prompt: expected {len(asked)}, one a prompt, to tell the reward what the pictures should "
                    f"show, which prompt_embeds do not say; got {reward_prompt!r}."
                )
            reward = _built(reward).to(self.pipe._execution_device)
            search = RewardSearch(self._score(reward, told, count, columns), best_of, as_ascent(ascent), reward_scale)
            search.check(self.pipe, reward, options)
        options |= self._control(control_image, options)
        drawn: dict[str, Any] = {}
        if refine is not None:
            if prompt is None:
                raise ValueError("refine rewrites prompts, and there is none: prompt_embeds are drawn as they are.")
            refiner = build_refiner(refine)
            texts = [refined(refiner, one, list(self.concepts)) for one in asked]
            prompt = texts[0] if isinstance(prompt, str) else texts
            drawn["base_prompts"] = [one for one in asked for _ in range(count)]
        drawn["prompts"] = [one for one in _listed(prompt, options) for _ in range(count)]
        with self.applied(alignit=alignit, lora_scale=lora_scale, truncation=truncation) as pipe:
            output_type = options.pop("output_type", "pil")
            if reward is not None:
                first = int(torch.randint(2**31, ())) if seed is None else seed
                pictures, drawn["seeds"], drawn["rewards"], drawn["nsfw_content_detected"] = draw_best(
                    pipe, prompt, first, count * len(asked), search, options
                )
                return Drawn(_converted(pipe, pictures, output_type), **drawn)
            if seed is not None:
                drawn["seeds"] = [seed + i for i in range(count * len(asked))]
                options["generator"] = generators(drawn["seeds"])
            output = pipe(prompt, output_type="latent" if output_type == "latent" else "pt", **options)
            images = _converted(pipe, require_finite(output[0], network_of(pipe).dtype), output_type)
        if options.get("return_dict") is False:
            return (images, *output[1:])
        return Drawn(**{**output, "images": images}, **drawn)

    @contextmanager
    def applied(
        self,
        *,
        alignit: bool | Mapping[str, Any] | None = None,
        lora_scale: Mapping[str, float] | float | None = None,
        truncation: int | None = None,
    ) -> Iterator[Any]:
        """Inside, the stock pipeline `pipe`, which it yields, draws with all parts; settings as of a call."""
        alignit = self.alignit if alignit is None else alignit
        scales = self._scales(lora_scale)
        if alignit:
            self._check_alignit()
        if truncation is not None and not self.concepts:
            raise ValueError(f"truncation: there is no concept to truncate, got {truncation}.")
        with ExitStack() as stack:
            stack.enter_context(self._weights(scales))
            # an offloaded pipeline that is left by an exception has parts on the device, and some of `_weights` are not
            stack.callback(self.pipe.maybe_free_model_hooks)
            if alignit:
                settings = next((dict(s) for s in (alignit, self.alignit) if isinstance(s, Mapping)), {})
                base = None if self._customizer is None else self._customizer.base
                found = [concept.concept for concept in self.concepts.values()]
                stack.enter_context(
                    aligned(
                        self.pipe, found, base=base, truncation=truncation, base_adapters=list(self.loras), **settings
                    )
                )
            else:
                learned = [c.concept.learned for c in self.concepts.values() if c.concept.learned is not None]
                if learned or truncation is not None:
                    stack.enter_context(Concepts(learned).applied(self.pipe, truncation))
            yield self.pipe

    @contextmanager
    def _weights(self, scales: dict[str, float]) -> Iterator[None]:
        """Inside, styles and customiser are in the networks."""
        scales = scales | dict.fromkeys(self._customizer_adapters, 1.0)
        unknown = sorted({name for names in _adapters(self.base).values() for name in names} - set(scales))
        if unknown:
            raise ValueError(
                f"The adapter {unknown[0]!r} was loaded into this pipeline after it was composed: compose it with the "
                "others, as one of the loras."
            )
        scales = {name: scale for name, scale in scales.items() if scale}
        with ExitStack() as stack:
            if scales:
                for pipe in self._weighted:
                    stack.callback(pipe.disable_lora)
                    pipe.enable_lora()
                    pipe.set_adapters(list(scales), list(scales.values()))
            if self._processors is not None:
                unet = self.base.unet
                for processor in self._processors.values():
                    if isinstance(processor, nn.Module):  # with weights, which were not there when the U-Net was moved
                        processor.to(unet.device, unet.dtype)
                stack.callback(unet.set_attn_processor, dict(unet.attn_processors))
                unet.set_attn_processor(dict(self._processors))
            if self._tokenizer is not None:
                stack.callback(setattr, self.pipe, "tokenizer", self.pipe.tokenizer)
                self.pipe.tokenizer = self._tokenizer
            yield

    def _scales(self, lora_scale: Mapping[str, float] | float | None) -> dict[str, float]:
        if lora_scale is None:
            return dict(self.loras)
        if not isinstance(lora_scale, Mapping):
            lora_scale = dict.fromkeys(self.loras, float(lora_scale))
        unknown = sorted(set(lora_scale) - set(self.loras))
        if unknown:
            there = ", ".join(self.loras) or "none"
            raise ValueError(f"lora_scale: expected names of the LoRAs that are loaded ({there}), got {unknown[0]!r}.")
        return self.loras | dict(lora_scale)

    def _check_alignit(self) -> None:
        if not self.concepts:
            raise ValueError("AlignIT keeps a concept from the rest of its prompt: compose with concepts=[...].")
        if self._customizer is not None and len(self.concepts) > 1:
            raise ValueError(
                f"AlignIT of {self._customizer.concept.phrase!r}, which changes weights, goes with no other concept: "
                "theirs would pass through its weights. Draw with alignit=False, or with concepts of NeTI, P+ and "
                "Textual Inversion, of which any number goes together."
            )

    def _control(self, control_image: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """`control_image` by the name that the stock pipeline has for it."""
        has_net = getattr(self.pipe, "controlnet", None) is not None
        known = inspect.signature(type(self.pipe).__call__).parameters
        name = "control_image" if "control_image" in known else "image"
        if has_net and control_image is None and options.get(name) is None:
            raise ValueError("This pipeline has a ControlNet: pass control_image, or compose without controlnet.")
        if not has_net and control_image is not None:
            raise ValueError("control_image needs a ControlNet: compose with controlnet=...")
        return {} if control_image is None else {name: control_image}

    def _score(
        self, reward: nn.Module, told: list[str], images: int, columns: Mapping[str, Sequence[Any]] | None
    ) -> Score:
        """Images -> [B], by the prompts in words that a judge knows."""
        nouns = {phrase: concept.concept.noun for phrase, concept in self.concepts.items()}
        prompts = [substitute(one, nouns) for one in told for _ in range(images)]
        repeated = {name: [v for v in values for _ in range(images)] for name, values in (columns or {}).items()}
        if isinstance(reward, WeightedRewards):
            return lambda pictures: -reward(pictures, prompts, **repeated).loss
        return lambda pictures: reward(pictures, prompts, **repeated)


@dataclass
class Drawn(BaseOutput):
    """What a call of `Composed` returns.

    images: as the stock pipeline has them. prompts: as they were drawn, one an image. base_prompts: what they were
    before `refine`. seeds, rewards [B]: of the images that are returned, where there are any.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    prompts: list[str] | None = None
    base_prompts: list[str] | None = None
    seeds: list[int] | None = None
    rewards: Tensor | None = None


def _built(reward: Any) -> nn.Module:
    if isinstance(reward, nn.Module):
        return reward
    if isinstance(reward, str):
        return build_reward(reward)
    return combine([config if isinstance(config, RewardConfig) else RewardConfig(**config) for config in reward])


def _converted(pipe: Any, images: Tensor, output_type: str) -> Any:
    """As the pipeline's own output is."""
    if output_type in ("pt", "latent"):
        return images
    images = pipe.image_processor.pt_to_numpy(images)
    return images if output_type == "np" else pipe.image_processor.numpy_to_pil(images)


def _listed(prompt: Any, options: Mapping[str, Any]) -> list[str]:
    if prompt is None:
        return [""] * len(options.get("prompt_embeds", ()))
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _adapters(pipe: Any) -> dict[str, list[str]]:
    """Names of the LoRAs of each module of a pipeline."""
    return {
        name: list(module.peft_config)
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and getattr(module, "peft_config", None)
    }
