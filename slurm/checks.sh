# shellcheck shell=bash
# Checks of the settings. Each of them ends the script with one line, and leaves nothing of a setting to be computed
# before: in Bash, `((X))` runs what stands in X as `a[$(command)]`, and takes 08 for octal.

# One line on standard error. What comes from logs may hold escape sequences.
fail() {
    printf 'dasd: error: %s\n' "$*" | LC_ALL=C tr '\000-\011\013-\037\177' ' ' >&2
    exit 1
}

# A value on one line, as Bash would read it, and cut.
shown() { LC_ALL=C printf '%q' "${1:0:120}"; }

one_of() {
    local name=$1 value=${!1-} choice
    shift
    for choice in "$@"; do [[ $value == "$choice" ]] && return; done
    fail "$name=$(shown "$value"): write one of $*, in slurm/env.sh"
}

# whole_number NAME LEAST MOST. Leading zeros are taken off.
whole_number() {
    local value=${!1-} number
    if [[ $value =~ ^0*([0-9]{1,9})$ ]]; then
        number=$((10#${BASH_REMATCH[1]}))
        if ((number >= $2 && number <= $3)); then
            printf -v "$1" '%d' "$number"
            return
        fi
    fi
    fail "$1=$(shown "$value"): write a whole number from $2 to $3, in slurm/env.sh"
}

# A number between 0 and 1.
share() {
    [[ -z ${!1-} || ${!1} =~ ^0?\.[0-9]{1,9}$ ]] || fail "$1=$(shown "${!1-}"): write a share like 0.4, in slurm/env.sh"
}

# A path that Slurm, Hydra and the containers take as it is. Empty values are let pass: other checks look for them.
plain_path() {
    local LC_ALL=C value=${!1-}
    [[ -z $value || $value =~ ^[A-Za-z0-9_./+@]([A-Za-z0-9_./+@ -]*[A-Za-z0-9_./+@-])?$ ]] ||
        fail "$1=$(shown "$value"): give a path of ASCII letters, digits, spaces inside and any of _ . / + @ -"
}

# Text that goes on as one word.
one_line() {
    [[ ! ${!1-} =~ [[:cntrl:]] && ${!1-} != -* ]] ||
        fail "$1=$(shown "${!1-}"): write it on one line, and without a dash before it"
}

# Words that are split at spaces, where quotes would stay what they are.
plain_words() {
    [[ ! ${!1-} =~ [[:cntrl:]\"\'\\] ]] ||
        fail "$1=$(shown "${!1-}"): write it on one line without quotes: it is split at spaces"
}

# As dasd_megatron/access.py has it. The key itself is not shown.
plain_key() {
    local LC_ALL=C key=${!1}
    [[ $key =~ ^[!-~]{16,}$ ]] ||
        fail "$1 has ${#key} characters and has to be 16 or more of ASCII that are no spaces"
}
