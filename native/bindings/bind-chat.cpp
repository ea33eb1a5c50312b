// bind-chat.cpp: llama.cpp's own chat code (common/chat.h, in the libllama-common that llama-cpp-python installs):
// messages and tools to a prompt, a grammar and a parser, the parser's reading of an answer, and JSON schemas to
// grammars. JSON goes in and out as text, in the form of OpenAI's API.
#include "bindings.h"
#include "chat.h"
#include "jinja-budget.h"
#include "json-schema-to-grammar.h"
#include "llama.h"
#include "log.h"

#include <memory>
#include <utility>

// What upstream throws may span lines and quote the template; Python makes one line of it.
template <typename F> static auto outside_gil(F && body) {
    const py::gil_scoped_release unlocked;
    try {
        return body();
    } catch (const std::bad_alloc &) {
        throw std::runtime_error("out of memory");
    } catch (const std::exception & err) {
        throw std::runtime_error(err.what());
    }
}

struct chat_options {
    std::string                        tools; // JSON array, "" for none
    std::string                        tool_choice = "auto";
    std::string                        json_schema; // "" for none
    std::map<std::string, std::string> variables;   // JSON texts
    bool                               add_generation_prompt = true;
    std::string                        image_type            = "media_marker";
    bool                               jinja                 = true;
    bool                               pure                  = false; // no analysis of the template for a parser
};

// A rendered prompt, and what reads the answer to it.
class chat_prompt {
public:
    chat_prompt(common_chat_params rendered, bool parse_tool_calls) : params(std::move(rendered)), syntax(params) {
        syntax.parse_tool_calls = parse_tool_calls;
        if (!params.parser.empty()) {
            syntax.parser.load(params.parser);
        }
    }

    std::string parse(const std::string & text, bool is_partial) const {
        return outside_gil([&] { return common_chat_parse(text, is_partial, syntax).to_json_oaicompat(true).dump(); });
    }

    // What `text`, the whole answer until now, has more than at the last call: [(content, index, id, name, arguments)],
    // index -1 where there is no tool call.
    using diff = std::tuple<std::string, int, std::string, std::string, std::string>;

    std::vector<diff> advance(const std::string & text, bool is_partial) {
        return outside_gil([&] {
            common_chat_msg   now = common_chat_parse(text, is_partial, syntax);
            std::vector<diff> diffs;
            if (now.empty()) {
                return diffs;
            }
            for (const auto & d : common_chat_msg_diff::compute_diffs(last, now)) {
                const int index = d.tool_call_index == std::string::npos ? -1 : (int) d.tool_call_index;
                diffs.emplace_back(
                    d.reasoning_content_delta + d.content_delta, index, d.tool_call_delta.id, d.tool_call_delta.name,
                    d.tool_call_delta.arguments);
            }
            last = now;
            return diffs;
        });
    }

    common_chat_params params;

private:
    common_chat_parser_params syntax;
    common_chat_msg           last;
};

class chat_templates {
public:
    chat_templates(uintptr_t model, const std::string & source, const std::string & bos, const std::string & eos) {
        common_log_set_verbosity_thold(-1); // what is wrong comes as an exception
        outside_gil([&] {
            const auto * lmodel = reinterpret_cast<const llama_model *>(model);
            const char * own    = lmodel == nullptr ? nullptr : llama_model_chat_template(lmodel, nullptr);
            const char * tools  = lmodel == nullptr ? nullptr : llama_model_chat_template(lmodel, "tool_use");
            for (const char * text :
                 { source.c_str(), source.empty() ? own : nullptr, source.empty() ? tools : nullptr }) {
                if (text != nullptr && *text != '\0') {
                    jinja_check(text);
                }
            }
            // without a template upstream takes ChatML; it asserts that there is a model or a source
            templates = common_chat_templates_init(
                lmodel, source.empty() && lmodel == nullptr ? std::string("chatml") : source, bos, eos);
            jinja_bound(templates.get());
        });
    }

    std::unique_ptr<chat_prompt> apply(const std::string & messages, const chat_options & options) const {
        return outside_gil([&] {
            common_chat_templates_inputs inputs;
            inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(messages));
            if (options.image_type != "media_marker") {
                for (auto & message : inputs.messages) {
                    for (auto & part : message.content_parts) {
                        part.type = part.type == "media_marker" ? options.image_type : part.type;
                    }
                }
            }
            if (!options.tools.empty()) {
                inputs.tools = common_chat_tools_parse_oaicompat(common_json::parse(options.tools));
            }
            inputs.tool_choice           = common_chat_tool_choice_parse_oaicompat(options.tool_choice);
            inputs.json_schema           = options.json_schema;
            inputs.add_generation_prompt = options.add_generation_prompt;
            inputs.use_jinja             = options.jinja;
            inputs.force_pure_content    = options.pure;
            inputs.chat_template_kwargs  = options.variables;
            inputs.parallel_tool_calls =
                common_chat_templates_get_caps(templates.get()).at("supports_parallel_tool_calls");
            const auto thinking = options.variables.find("enable_thinking");
            if (thinking != options.variables.end()) {
                inputs.enable_thinking = thinking->second == "true";
            }
            const bool          parse = !inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
            const jinja_running running;
            auto rendered = std::make_unique<chat_prompt>(common_chat_templates_apply(templates.get(), inputs), parse);
            running.check();
            return rendered;
        });
    }

    std::map<std::string, bool> caps() const { return common_chat_templates_get_caps(templates.get()); }

    std::string source() const { return common_chat_templates_source(templates.get()); }

    bool explicit_template() const { return common_chat_templates_was_explicit(templates.get()); }

private:
    common_chat_templates_ptr templates;
};

// [(kind, text)], kind one of "word", "token", "pattern", "pattern_full"
static std::vector<std::pair<std::string, std::string>> triggers(const chat_prompt & prompt) {
    std::vector<std::pair<std::string, std::string>> out;
    for (const auto & trigger : prompt.params.grammar_triggers) {
        const char * kind = trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_WORD      ? "word"
                            : trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN   ? "token"
                            : trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN ? "pattern"
                                                                                  : "pattern_full";
        out.emplace_back(
            kind, trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN ? std::to_string(trigger.token) : trigger.value);
    }
    return out;
}

void register_chat(py::module_ & m) {
    py::class_<chat_prompt>(m, "ChatPrompt")
        .def_property_readonly("text", [](const chat_prompt & p) { return p.params.prompt; })
        .def_property_readonly("grammar", [](const chat_prompt & p) { return p.params.grammar; })
        .def_property_readonly("grammar_lazy", [](const chat_prompt & p) { return p.params.grammar_lazy; })
        .def_property_readonly("generation_prompt", [](const chat_prompt & p) { return p.params.generation_prompt; })
        .def_property_readonly("triggers", &triggers)
        .def_property_readonly("stops", [](const chat_prompt & p) { return p.params.additional_stops; })
        .def_property_readonly("preserved_tokens", [](const chat_prompt & p) { return p.params.preserved_tokens; })
        .def_property_readonly(
            "format", [](const chat_prompt & p) { return std::string(common_chat_format_name(p.params.format)); })
        .def("parse", &chat_prompt::parse, py::arg("text"), py::arg("is_partial"))
        .def("advance", &chat_prompt::advance, py::arg("text"), py::arg("is_partial"));

    py::class_<chat_templates>(m, "ChatTemplates")
        .def(
            py::init<uintptr_t, const std::string &, const std::string &, const std::string &>(), py::arg("model"),
            py::arg("source"), py::arg("bos") = "", py::arg("eos") = "")
        .def(
            "apply",
            [](const chat_templates & self, const std::string & messages, const std::string & tools,
               const std::string & tool_choice, const std::string & json_schema,
               const std::map<std::string, std::string> & variables, bool add_generation_prompt,
               const std::string & image_type, bool jinja, bool pure) {
                return self.apply(
                    messages,
                    { tools, tool_choice, json_schema, variables, add_generation_prompt, image_type, jinja, pure });
            },
            py::arg("messages"), py::kw_only(), py::arg("tools") = "", py::arg("tool_choice") = "auto",
            py::arg("json_schema") = "", py::arg("variables") = std::map<std::string, std::string>(),
            py::arg("add_generation_prompt") = true, py::arg("image_type") = "media_marker", py::arg("jinja") = true,
            py::arg("pure") = false)
        .def("caps", &chat_templates::caps)
        .def_property_readonly("source", &chat_templates::source)
        .def_property_readonly("is_explicit", &chat_templates::explicit_template);

    m.def(
        "json_schema_to_grammar",
        [](const std::string & schema) {
            return outside_gil([&] { return json_schema_to_grammar(common_json::parse(schema), true); });
        },
        py::arg("schema"));
}
