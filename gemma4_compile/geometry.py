"""What a checkpoint's config means: layer kinds, head dims, and who owns which KV."""

from dataclasses import dataclass

from transformers import Gemma4TextConfig, Gemma4VisionConfig

WHOLE_MODEL = "model"


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer. `kv_from` is the layer whose K and V it reads: its own index, or an earlier layer's."""

    index: int
    kind: str  # "sliding_attention" | "full_attention" | "vision"
    heads: int
    kv_heads: int
    head_dim: int
    kv_from: int
    k_eq_v: bool
    intermediate: int

    @property
    def shares_kv(self) -> bool:
        return self.kv_from != self.index

    @property
    def site(self) -> str:
        return f"layers.{self.index}"


@dataclass(frozen=True)
class Geometry:
    """A text model, or the encoder of a vision tower: its layers and what they have in common. Sizes in elements; heads are
    those of one rank.

    ranks    that the model is divided between (tensor parallel)
    scaled   whether each layer ends in a product with its scalar"""

    layers: tuple[LayerGeometry, ...]
    hidden: int
    per_layer_input: int  # 0 without PLE
    experts: int  # 0 without experts
    top_k: int
    ranks: int = 1
    scaled: bool = True

    def kv_owners(self, kind: str) -> list[LayerGeometry]:
        """Layers of a kind that have keys and values of their own."""
        return [layer for layer in self.layers if layer.kind == kind and not layer.shares_kv]


def geometry(config: Gemma4TextConfig, ranks: int = 1) -> Geometry:
    """The geometry of a Gemma4TextConfig, as one of `ranks` ranks has it; works for transformers 5.17 and later, which differ
    in how they tell it."""
    kinds = list(config.layer_types or ())
    first_shared = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    layers = []
    for index, kind in enumerate(kinds):
        full = kind == "full_attention"
        shared = 0 < first_shared <= index
        owner = max((i for i in range(first_shared) if kinds[i] == kind), default=index) if shared else index
        k_eq_v = bool(config.attention_k_eq_v) and full
        head_dim, kv_heads = _heads(config, index, full, k_eq_v)
        double = bool(config.use_double_wide_mlp) and shared
        layers.append(
            LayerGeometry(
                index=index,
                kind=kind,
                heads=config.num_attention_heads // ranks,
                kv_heads=max(1, kv_heads // ranks),  # fewer heads than ranks: several ranks have the same one
                head_dim=head_dim,
                kv_from=owner,
                k_eq_v=k_eq_v,
                intermediate=config.intermediate_size * (2 if double else 1),
            )
        )
    moe = bool(getattr(config, "enable_moe_block", False))
    return Geometry(
        layers=tuple(layers),
        hidden=config.hidden_size,
        per_layer_input=getattr(config, "hidden_size_per_layer_input", 0) or 0,
        experts=(config.num_experts or 0) if moe else 0,
        top_k=(config.top_k_experts or 0) if moe else 0,
        ranks=ranks,
    )


def vision_geometry(config: Gemma4VisionConfig) -> Geometry:
    """The geometry of a vision tower's encoder; it is whole on each rank."""
    layers = tuple(
        LayerGeometry(
            index=index,
            kind="vision",
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            kv_from=index,
            k_eq_v=False,
            intermediate=config.intermediate_size,
        )
        for index in range(config.num_hidden_layers)
    )
    return Geometry(layers, config.hidden_size, per_layer_input=0, experts=0, top_k=0, scaled=False)


def _heads(config: Gemma4TextConfig, index: int, full: bool, k_eq_v: bool) -> tuple[int, int]:
    """Head dim and KV heads of one layer."""
    if hasattr(config, "per_layer_config"):  # transformers 5.2x resolves them itself
        layer = config.per_layer_config[index]
        return layer.head_dim, layer.num_key_value_heads
    head_dim = (config.global_head_dim if full else None) or config.head_dim
    return head_dim, (config.num_global_key_value_heads if k_eq_v else None) or config.num_key_value_heads
