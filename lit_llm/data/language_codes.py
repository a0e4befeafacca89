"""Codes of languages, and what people write instead of them."""

from __future__ import annotations

# ISO 639-1. Where words are separated depends on the language, so a wrong code must not pass.
_TWO_LETTERS = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es "
    "et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj "
    "kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv "
    "ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti "
    "tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu".split()
)
# of ISO 639-3, for languages that have no code of two letters: those of FLORES-200, Wikipedia and Universal Dependencies
_THREE_LETTERS = frozenset(
    "abq ace acm acq ady aeb ajp als ang apc arc ars ary arz ast awa azb ban bar bcl bem bew bho bjn bpy brx bug bxr cbk "
    "cdo ceb cho chr chy cjk ckb crh csb dag dar din diq doi dsb dyu eml ext fat fil fon frp frr fur fuv gag gan gaz gcr "
    "glk gom gor got grc gsw guc gur hak haw hif hne hsb hsn hyw ilo inh jam kab kac kam kbd kbp kcg kea kha kmb kmr knc "
    "koi krc krl ksh kum lad lbe lez lfn lij liv lld lmo ltg lua luo lus lzh mad mag mai mdf mhr min mni mnw mos mrj mwl "
    "myv mzn nah nan nap nds new nia non nov nqo nrm nso nus olo pag pam pap pbt pcd pcm pdc pfl pih pms pnb pnt prs quy "
    "rif rmy rue rup sah sat scn sco sgs shi shn skr sma smj smn sms srn stq syr szl szy taq tay tcy tet tpi trv tum tyv "
    "tzm udm umb vec vep vls vmf vro war wuu xal xmf yue zea zgh".split()
)
# codes of three letters (ISO 639-2, 639-3) of languages that have one of two
_SHORTER = dict(
    pair.split(":")
    for pair in (
        "aar:aa abk:ab afr:af aka:ak alb:sq amh:am ara:ar arb:ar arg:an arm:hy asm:as ava:av ave:ae aym:ay aze:az bak:ba "
        "bam:bm baq:eu bel:be ben:bn bih:bh bis:bi bod:bo bos:bs bre:br bul:bg bur:my cat:ca ces:cs cha:ch che:ce chi:zh "
        "chu:cu chv:cv cmn:zh cor:kw cos:co cre:cr cym:cy cze:cs dan:da deu:de div:dv dut:nl dzo:dz ell:el eng:en epo:eo "
        "est:et eus:eu ewe:ee fao:fo fas:fa fij:fj fin:fi fra:fr fre:fr fry:fy ful:ff geo:ka ger:de gla:gd gle:ga glg:gl "
        "glv:gv gre:el grn:gn guj:gu hat:ht hau:ha heb:he her:hz hin:hi hmo:ho hrv:hr hun:hu hye:hy ibo:ig ice:is ido:io "
        "iii:ii iku:iu ile:ie ina:ia ind:id ipk:ik isl:is ita:it jav:jv jpn:ja kal:kl kan:kn kas:ks kat:ka kau:kr kaz:kk "
        "khk:mn khm:km kik:ki kin:rw kir:ky kom:kv kon:kg kor:ko kua:kj kur:ku lao:lo lat:la lav:lv lim:li lin:ln lit:lt "
        "ltz:lb lub:lu lug:lg lvs:lv mac:mk mah:mh mal:ml mao:mi mar:mr may:ms mkd:mk mlg:mg mlt:mt mon:mn mri:mi msa:ms "
        "mya:my nau:na nav:nv nbl:nr nde:nd ndo:ng nep:ne nld:nl nno:nn nob:nb nor:no npi:ne nya:ny oci:oc oji:oj ori:or "
        "orm:om ory:or oss:os pan:pa per:fa pes:fa pli:pi pol:pl por:pt pus:ps que:qu roh:rm ron:ro rum:ro run:rn rus:ru "
        "sag:sg san:sa sin:si slk:sk slo:sk slv:sl sme:se smo:sm sna:sn snd:sd som:so sot:st spa:es sqi:sq srd:sc srp:sr "
        "ssw:ss sun:su swa:sw swe:sv swh:sw tah:ty tam:ta tat:tt tel:te tgk:tg tgl:tl tha:th tib:bo tir:ti ton:to tsn:tn "
        "tso:ts tuk:tk tur:tr twi:tw uig:ug ukr:uk urd:ur uzb:uz uzn:uz ven:ve vie:vi vol:vo wel:cy wln:wa wol:wo xho:xh "
        "yid:yi yor:yo zha:za zho:zh zsm:ms zul:zu "
    ).split()
)
_MEANT = {  # what people write instead
    **{"cz": "cs", "du": "nl", "jp": "ja", "cn": "zh", "gr": "el", "ua": "uk", "dk": "da", "vn": "vi", "ge": "ka"},
    **{"in": "id", "iw": "he", "sp": "es"},
    **_SHORTER,
}


def check_language(code: str) -> None:
    """See that a string is a language code: two letters of ISO 639-1, or three for a known language that has no such code.

    Parts behind a hyphen (`zh-Hant`) are free.

    Raises:
        ValueError: it is not; where a common mistake is recognised, the right code is named.
    """
    main = primary_language(code)
    if main in _TWO_LETTERS | _THREE_LETTERS and code.split("-")[0] == main:
        return
    meant = _MEANT.get(main, main if main in _TWO_LETTERS | _THREE_LETTERS else None)
    hint = "" if meant is None else f" Is it {meant}?"
    raise ValueError(f"{code!r} is not a language code of ISO 639 in small letters (en, de, zh, ...).{hint}")


def primary_language(code: str) -> str:
    """`zh` of `zh-Hant`."""
    return code.split("-")[0].lower()
