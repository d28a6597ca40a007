"""How a hosted Trainer publishes: `push_to_hub`, `create_model_card`, and the one flag `push_to_hub=True`.

| the Trainer's own | here |
|---|---|
| uploads the whole output folder, its pickled arguments included | the model and its evidence, by an allow-list, in one commit |
| writes a card of its own, over the one that is there | writes ours, from what was measured |
| makes the repository when it is built, pushes checkpoints while it trains | publishes the end, with evidence |

Publishing lies above the trainers (docs/house.md), so it is loaded by its name when it is asked for: here and nowhere else.
"""

import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)

# At run time it stands before a Trainer class, as the mixin that it is a part of.
_Base: Any = object


def _publishing() -> Any:
    return importlib.import_module("hf_backdoor_defense.hub.trained")


def only_at_the_end(args: Any) -> None:
    """Let these arguments push at the end alone: a checkpoint in the middle has no evidence. Changes `args`."""
    if not args.push_to_hub or str(getattr(args.hub_strategy, "value", args.hub_strategy)) == "end":
        return
    asked = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    # "every_save" is what nobody asked for: the default.
    level = logging.INFO if asked == "every_save" else logging.WARNING
    logger.log(
        level,
        "hub_strategy is %s, and `end` is used: a checkpoint in the middle of a training has nothing that shows what it is. "
        "trainer.save_model() or trainer.push_to_hub() publishes when the training is over.",
        asked,
    )
    args.hub_strategy = type(args.hub_strategy)("end")


class PushMixin(_Base):
    """The publishing half of `DefenseMixin`."""

    args: Any
    hub_model_id: str | None
    published_scores: tuple[str, Any, Any] = ("", None, None)  # of which weights, the model's and a clean reference's

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Decide the repository's name, and nothing else: it is made when there is something to publish.

        Raises:
            ValueError: no token. ConnectionError: the Hub was not reached.
        """
        if self.is_world_process_zero():
            self.hub_model_id = _publishing().repository(self.args, token=token)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        force: bool = False,
        attacked: bool = False,
        dry_run: bool = False,
        scores: Any = None,
        clean_reference_scores: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and publish it with its results, report, card and checksums: one commit, no pickle.

        Args:
            commit_message, token, revision, private: as the Trainer's; `private` is of a repository that is made here.
            blocking: False publishes in a thread and returns its future.
            force: publish although a method was INERT; the card says so first.
            attacked: publish weights that were attacked on purpose (`backdoored.json` in the output folder), privately.
            dry_run: write everything into the output folder, and ask the Hub nothing.
            scores, clean_reference_scores: what `evaluate_backdoor` returned for this model, and for a clean one.
            kwargs: `license`, `language`, `datasets`, `base_model`, and the Trainer's words for them.

        Returns:
            `hub.publish.Published` (files, card, url, commit); None on other processes than the first.

        Raises:
            ValueError: what must not be published, or what the Hub refused. The saved model stays in the output folder.

        Example: see docs/publishing.md; with a trained trainer:

            trainer.push_to_hub(dry_run=True, license="mit").files
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        hub, args = _publishing(), self.args
        token = token or args.hub_token
        if self.hub_model_id is None:
            name = hub.repository(args, token=token, ask=not dry_run)
            self.hub_model_id = None if dry_run else name
        else:
            name = self.hub_model_id
        return hub.publish_trained(
            self,
            name,
            commit_message=commit_message,
            blocking=blocking,
            token=token,
            revision=revision or args.hub_revision,
            private=args.hub_private_repo if private is None else private,
            force=force,
            attacked=attacked,
            dry_run=dry_run,
            scores=scores,
            clean_reference_scores=clean_reference_scores,
            card=kwargs,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card, from what was measured, for a model that was saved into the output folder.

        Args: as the Trainer's; what it says of the model comes from the results, not from here.

        While a training goes on nothing is written: trl asks for a card at every checkpoint.
        """
        if self.is_world_process_zero() and not self.is_in_train:
            hub = _publishing()
            try:
                name = self.hub_model_id or hub.repository(self.args, ask=False)
            except ValueError:  # nobody has said who publishes it
                name = f"OWNER/{self.args.hub_model_id or 'model'}"
            hub.write_card(self, name, **kwargs)
