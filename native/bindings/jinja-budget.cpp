// jinja-budget.cpp: see the header. The nodes are those of common/jinja/runtime.h; each bounded one evaluates its
// operands, looks at their sizes, and lets upstream's own node do the work on the values.
#include "jinja-budget.h"

#include "chat.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>

// As common/chat.cpp defines it; native/upstream/PIN keeps it in place.
struct common_chat_templates {
    bool                                  add_bos;
    bool                                  add_eos;
    bool                                  has_explicit_template;
    std::unique_ptr<common_chat_template> template_default;
    std::unique_ptr<common_chat_template> template_tool_use;
};

namespace {

using namespace jinja;

constexpr size_t MAX_SOURCE  = size_t(512) << 10; // characters; the longest published templates have 30,000
constexpr int    MAX_NESTING = 100;               // brackets, blocks and calls
constexpr int    MAX_TOKENS  = 2000;              // of one expression or statement
constexpr int    MAX_LEVELS  = 400;               // nodes within nodes
constexpr size_t MAX_STEPS   = 500000;            // loops, calls, filters and operators of one rendering
constexpr size_t MAX_BYTES   = size_t(512) << 20; // of all intermediate values together
constexpr size_t MAX_VALUE   = size_t(64) << 20;  // of one of them

thread_local size_t steps = 0, bytes = 0;
thread_local int    depth  = 0;
thread_local bool   beyond = false;

[[noreturn]] void refuse() {
    beyond = true;
    throw std::runtime_error("the template needs more steps, memory or nested calls than a template may take");
}

void charge(size_t n_bytes) {
    bytes += n_bytes;
    if (beyond || ++steps > MAX_STEPS || n_bytes > MAX_VALUE || bytes > MAX_BYTES) {
        refuse();
    }
}

// About how many bytes a value has; items count as one each.
size_t size_of(const value & v) {
    if (is_val<value_string>(v)) {
        return v->val_str.length() + 32 * v->val_str.parts.size();
    }
    return 16 * (1 + std::max(v->val_arr.size(), v->val_obj.size()));
}

// By how much an argument can multiply what it is applied to.
size_t factor_of(const value & v) {
    if (is_val<value_kwarg>(v)) {
        return factor_of(cast_val<value_kwarg>(v)->val);
    }
    if (is_val<value_int>(v)) {
        const int64_t n = v->as_int();
        return (size_t) std::min<int64_t>(n < 0 ? (n == INT64_MIN ? INT64_MAX : -n) : n, INT64_MAX / 2);
    }
    return is_val<value_string>(v) ? v->val_str.length() : 1;
}

void foresee(size_t size, const std::vector<value> & factors) {
    size_t factor = 1;
    for (const value & v : factors) {
        factor = std::max(factor, factor_of(v));
    }
    if (factor > MAX_VALUE / std::max<size_t>(size, 1)) {
        refuse();
    }
}

value counted(value v) {
    charge(size_of(v));
    return v;
}

struct deeper {
    deeper() {
        if (++depth > MAX_NESTING) {
            depth--;
            refuse();
        }
    }

    ~deeper() { depth--; }
};

struct value_node : expression {
    explicit value_node(value v) : held(std::move(v)) {}

    value execute_impl(context &) const override { return held; }

    value held;
};

statement_ptr node_of(const value & v) {
    return std::make_unique<value_node>(v);
}

std::vector<value> values_of(const statements & args, context & ctx) {
    std::vector<value> out;
    for (const auto & arg : args) {
        out.push_back(arg->execute(ctx));
    }
    return out;
}

statements nodes_of(const std::vector<value> & values) {
    statements out;
    for (const value & v : values) {
        out.push_back(node_of(v));
    }
    return out;
}

// stands first in the body of a loop
struct step_node : statement {
    value execute_impl(context &) const override { return counted(mk_val<value_undefined>()); }
};

struct bounded_binary : binary_expression {
    explicit bounded_binary(binary_expression && other) : binary_expression(std::move(other)) {}

    value execute_impl(context & ctx) const override {
        if (op.value == "and" || op.value == "or") { // the right side may not be looked at
            charge(1);
            return binary_expression::execute_impl(ctx);
        }
        const value a = left->execute(ctx), b = right->execute(ctx);
        if (op.value == "*" && (is_val<value_string>(a) || is_val<value_string>(b))) {
            foresee(32 + size_of(is_val<value_string>(a) ? a : b), { is_val<value_string>(a) ? b : a });
        }
        return counted(binary_expression(op, node_of(a), node_of(b)).execute_impl(ctx));
    }
};

struct bounded_call : call_expression {
    explicit bounded_call(call_expression && other) : call_expression(std::move(other)) {}

    value execute_impl(context & ctx) const override {
        const deeper             level;
        const std::vector<value> values = values_of(args, ctx);
        const value              called = callee->execute(ctx);
        if (is_val<value_func>(called)) {
            const auto * function = cast_val<value_func>(called);
            if (function->name == "range") {
                foresee(256, values);
            } else if (function->arg0) {
                foresee(size_of(function->arg0), values);
            }
        }
        return counted(call_expression(node_of(called), nodes_of(values)).execute_impl(ctx));
    }
};

struct bounded_call_statement : call_statement {
    explicit bounded_call_statement(call_statement && other) : call_statement(std::move(other)) {}

    value execute_impl(context & ctx) const override {
        const deeper level;
        return counted(call_statement::execute_impl(ctx));
    }
};

struct bounded_filter : filter_expression {
    explicit bounded_filter(filter_expression && other) : filter_expression(std::move(other)) {}

    value execute_impl(context & ctx) const override {
        const value   input = operand->execute(ctx);
        const auto *  call  = dynamic_cast<const call_expression *>(filter.get());
        const auto *  name  = dynamic_cast<const identifier *>(call != nullptr ? call->callee.get() : filter.get());
        statement_ptr by;
        if (name == nullptr) {
            throw std::runtime_error("Filter must be an identifier");
        }
        by = std::make_unique<identifier>(name->val);
        if (call != nullptr) {
            const std::vector<value> values = values_of(call->args, ctx);
            foresee(size_of(input), values);
            by = std::make_unique<call_expression>(std::move(by), nodes_of(values));
        }
        return counted(filter_expression(node_of(input), std::move(by)).execute_impl(ctx));
    }
};

void bound(statement_ptr & node, int level);

void bound(statements & nodes, int level) {
    for (auto & node : nodes) {
        bound(node, level);
    }
}

// `node` becomes a Bounded made of it
template <typename Bounded, typename T> void replace(statement_ptr & node, T * found) {
    const size_t pos = found->pos;
    node             = std::make_unique<Bounded>(std::move(*found));
    node->pos        = pos;
}

void bound(statement_ptr & node, int level) {
    if (!node) {
        return;
    }
    if (level > MAX_LEVELS) {
        throw std::runtime_error("the template is nested too deeply");
    }
    level++;
    statement * p = node.get();
    if (auto * s = dynamic_cast<if_statement *>(p)) {
        bound(s->test, level), bound(s->body, level), bound(s->alternate, level);
    } else if (auto * s = dynamic_cast<for_statement *>(p)) {
        bound(s->iterable, level), bound(s->body, level), bound(s->default_block, level);
        auto first = std::make_unique<step_node>();
        first->pos = s->pos;
        s->body.insert(s->body.begin(), std::move(first));
    } else if (auto * s = dynamic_cast<set_statement *>(p)) {
        bound(s->val, level), bound(s->body, level);
    } else if (auto * s = dynamic_cast<macro_statement *>(p)) {
        bound(s->args, level), bound(s->body, level);
    } else if (auto * s = dynamic_cast<filter_statement *>(p)) {
        bound(s->body, level);
    } else if (auto * s = dynamic_cast<call_statement *>(p)) {
        if (auto * call = dynamic_cast<call_expression *>(s->call.get())) {
            bound(call->args, level);
        }
        bound(s->body, level);
        replace<bounded_call_statement>(node, s);
    } else if (auto * s = dynamic_cast<member_expression *>(p)) {
        bound(s->object, level);
        if (auto * slice = dynamic_cast<slice_expression *>(s->property.get())) {
            bound(slice->start_expr, level), bound(slice->stop_expr, level), bound(slice->step_expr, level);
        } else if (s->computed) {
            bound(s->property, level);
        }
    } else if (auto * s = dynamic_cast<array_literal *>(p)) {
        bound(s->val, level);
    } else if (auto * s = dynamic_cast<tuple_literal *>(p)) {
        bound(s->val, level);
    } else if (auto * s = dynamic_cast<object_literal *>(p)) {
        for (auto & pair : s->val) {
            bound(pair.first, level), bound(pair.second, level);
        }
    } else if (auto * s = dynamic_cast<select_expression *>(p)) {
        bound(s->lhs, level), bound(s->test, level);
    } else if (auto * s = dynamic_cast<test_expression *>(p)) {
        bound(s->operand, level);
        if (auto * call = dynamic_cast<call_expression *>(s->test.get())) {
            bound(call->args, level);
        }
    } else if (auto * s = dynamic_cast<unary_expression *>(p)) {
        bound(s->argument, level);
    } else if (auto * s = dynamic_cast<keyword_argument_expression *>(p)) {
        bound(s->val, level);
    } else if (auto * s = dynamic_cast<spread_expression *>(p)) {
        bound(s->argument, level);
    } else if (auto * s = dynamic_cast<ternary_expression *>(p)) {
        bound(s->condition, level), bound(s->true_expr, level), bound(s->false_expr, level);
    } else if (auto * s = dynamic_cast<binary_expression *>(p)) {
        bound(s->left, level), bound(s->right, level);
        replace<bounded_binary>(node, s);
    } else if (auto * s = dynamic_cast<call_expression *>(p)) {
        bound(s->callee, level), bound(s->args, level);
        replace<bounded_call>(node, s);
    } else if (auto * s = dynamic_cast<filter_expression *>(p)) {
        bound(s->operand, level);
        if (auto * call = dynamic_cast<call_expression *>(s->filter.get())) {
            bound(call->args, level);
        }
        replace<bounded_filter>(node, s);
    }
}

// Upstream's parser and nodes recurse: neither sees what is nested deeper, or chained longer, than a stack bears.
void check_nesting(const std::vector<token> & tokens) {
    int              brackets = 0, in_one = 0;
    std::vector<int> blocks; // for each open one, how many nodes deep it is: an elif is an if in the else before it
    int              depth_of_blocks = 0;
    for (size_t i = 0; i < tokens.size(); i++) {
        const token & t = tokens[i];
        switch (t.t) {
            case token::open_paren:
            case token::open_square_bracket:
            case token::open_curly_bracket: brackets++; break;
            case token::close_paren:
            case token::close_square_bracket:
            case token::close_curly_bracket: brackets--; break;
            case token::open_statement:
            case token::open_expression: in_one = brackets = 0; break;
            default: break;
        }
        in_one += 1;
        if (t.t == token::open_statement && i + 1 < tokens.size()) {
            const std::string & word = tokens[i + 1].value;
            if (word.compare(0, 3, "end") == 0) {
                if (!blocks.empty()) {
                    depth_of_blocks -= blocks.back();
                    blocks.pop_back();
                }
            } else if (word == "if" || word == "for" || word == "macro" || word == "call" || word == "filter") {
                blocks.push_back(1);
                depth_of_blocks++;
            } else if (word == "elif" && !blocks.empty()) {
                blocks.back()++;
                depth_of_blocks++;
            }
        }
        if (brackets > MAX_NESTING || in_one > MAX_TOKENS || depth_of_blocks > 2 * MAX_NESTING) {
            throw std::runtime_error("the template is nested too deeply, or one of its expressions is too long");
        }
    }
}

} // namespace

jinja_running::jinja_running() {
    steps = bytes = 0;
    depth         = 0;
    beyond        = false;
}

jinja_running::~jinja_running() {
    beyond = false;
}

void jinja_running::check() const {
    if (beyond) {
        refuse();
    }
}

void jinja_check(const std::string & source) {
    if (source.size() > MAX_SOURCE) {
        throw std::runtime_error("expected a template of at most " + std::to_string(MAX_SOURCE) + " characters");
    }
    jinja::lexer              lexer;
    const jinja::lexer_result found = lexer.tokenize(source);
    check_nesting(found.tokens);
    jinja::program      program = jinja::parse_from_tokens(found);
    const jinja_running running;
    bound(program.body, 0);
    jinja::caps_get(program); // swallows what its trials throw
    running.check();
}

void jinja_bound(common_chat_templates * templates) {
    for (auto * t : { templates->template_default.get(), templates->template_tool_use.get() }) {
        if (t != nullptr) {
            bound(t->prog.body, 0);
        }
    }
}
