"""A model as the runtime calls it: one packed step of many requests in, the logits of the wanted rows out."""

from torch import Tensor, nn

from gemma4_compile.dynamo import first_line, switched_off
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.families import CAUSAL
from gemma4_compile.hf.parallel import vocabulary_of
from gemma4_compile.hf.vision import VisionPart
from gemma4_compile.optimized import state_of
from gemma4_compile.packed.program import Program, StepResult


class PackedModel:
    """An optimized Gemma4ForCausalLM over packed batches; see packed/inputs.py for a step's inputs.

    Compiled at once, for any number of tokens, requests and wanted rows, or loaded if this model was compiled before. It keeps
    the weights' tensors: make it after from_pretrained; `refresh` takes in what has changed since.

    Raises TypeError for another class of model, ValueError for one that was not optimized, whose attention is not causal, or
    whose step does not compile.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, CAUSAL):
            raise TypeError(
                f"a packed step takes Gemma4ForCausalLM, got {type(model).__name__}; load the checkpoint's text part"
            )
        self._state = state = state_of(model)
        if reason := switched_off():
            raise ValueError(f"an engine runs a compiled step, got {reason}; switch it on, or use model.generate()")
        if getattr(model.config, "use_bidirectional_attention", None) == "all":
            raise ValueError("attention must be causal, got use_bidirectional_attention='all'; use a decoder checkpoint")
        self.model, self.geometry, self.division = model, state.geometry, state.division
        self.vocabulary = vocabulary_of(model, state.division)
        self.program = self._compiled()

    def refresh(self) -> bool:
        """Take in the model as it is now; whether that gave another program.

        Raises ValueError for a model with other layers or another vocabulary, whose memory would have other sizes, and for one
        that no longer compiles."""
        vocabulary = vocabulary_of(self.model, self.division)
        if geometry(self.model.config, self.division.ranks) != self.geometry or vocabulary.size != self.vocabulary.size:
            raise ValueError("the model must keep its layers and its vocabulary, got others; make a new engine")
        before, self.program = self.program, self._compiled()
        return self.program is not before

    def image_program(self) -> Program:
        """The step of prompts with images, as the model is now; see packed/inputs.py. Raises ValueError if it does not
        compile."""
        return self._compiled(images=True)

    def tower_program(self, part: VisionPart) -> Program:
        """The vision part beside the model, as it is now. Raises ValueError if it does not compile."""
        try:
            return self._state.tower_program(part)
        except Exception as error:
            raise ValueError(f"the vision tower must compile, got {first_line(error)}") from error

    def _compiled(self, images: bool = False) -> Program:
        try:
            return self._state.packed_program(self.model, images=images)
        except Exception as error:  # whatever Dynamo, Inductor, Triton and the C++ compiler raise, in pages
            raise ValueError(f"the model's step must compile, got {first_line(error)}") from error

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [1, N, vocabulary], or of this rank's tokens; the step's keys and values are written in place."""
        return self.program(inputs)

    def run(self, inputs: dict[str, Tensor]) -> StepResult:
        """Those logits and final-normed states [N, H]; the step's keys and values are written in place."""
        return self.program.run(inputs)
