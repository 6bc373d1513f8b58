"""Completion of the installed command's words in bash, and in zsh by way of its `bashcompinit`."""

from __future__ import annotations

# The commands' own words come from Hydra, which expects a command of one word: the second is left out for it.
SCRIPT = """\
_attention_visualizer() {
    local word=${COMP_LINE##* } rest choices
    read -r _ command rest <<< "$COMP_LINE"
    case $command in
        train|analyze) [[ $COMP_LINE == *"$command "* ]] || rest=none ;;
        *) rest=none ;;
    esac
    if [ "$rest" = none ]; then
        COMPREPLY=($(compgen -W "train analyze --help --version" -- "$word"))
        return
    fi
    [[ $COMP_LINE == *" " && -n $rest ]] && rest="$rest "
    choices=$(COMP_LINE="$1 $rest" "$1" "$command" -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _attention_visualizer attention-visualizer attnviz
"""
